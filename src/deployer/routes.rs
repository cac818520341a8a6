//! Where requests are led, in terms of our own: pure, and the same whatever proxy leads them. How Caddy is told is for
//! [`super::caddy`].

use crate::manifest::Http;
use crate::manifest::types::{Domain, UrlPath};
use crate::names::ServiceName;
use std::collections::BTreeSet;

/// Where the requests for one domain and path are led.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The service that is reached there.
    pub service: ServiceName,
    /// A name, or `*.` and one.
    pub domain: Domain,
    /// This path and what is below it.
    pub path: UrlPath,
    /// The port of 127.0.0.1 that gets them.
    pub port: u16,
    /// The port of the service's own unit: another one while they are led to a candidate.
    pub own_port: u16,
    /// Nobody is led there: somebody else would answer for the service, which is unavailable.
    pub closed: bool,
}

/// What a service is reached by.
#[derive(Debug, Clone, Copy)]
pub struct Reached<'a> {
    /// Its name.
    pub service: &'a ServiceName,
    /// Where its requests are led.
    pub http: &'a Http,
    /// The entry of its own unit, where that is another one.
    pub own: Option<&'a Http>,
}

/// The routes of these services. A version that was put back may claim what a neighbour has by now: the first keeps it.
pub fn of<'a>(reached: impl IntoIterator<Item = Reached<'a>>, closed: &BTreeSet<u16>) -> Vec<Route> {
    let mut claimed = BTreeSet::new();
    let first = |r: &Reached| claimed.insert((r.http.domain.clone(), r.http.path.clone()));
    let route = |Reached { service, http, own }: Reached| {
        let port = http.internal_port.get();
        Route {
            service: service.clone(),
            domain: http.domain.clone(),
            path: http.path.clone(),
            port,
            own_port: own.map_or(port, |own| own.internal_port.get()),
            closed: closed.contains(&port),
        }
    };
    reached.into_iter().filter(first).map(route).collect()
}
