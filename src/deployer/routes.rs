//! Where requests are led, in terms of our own: pure, and the same whatever proxy leads them. How Caddy is told is for
//! [`super::caddy`].

use crate::manifest::Http;
use crate::manifest::types::{Domain, UrlPath};
use std::collections::BTreeSet;

/// Where the requests for one domain and path are led.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// A name, or `*.` and one.
    pub domain: Domain,
    /// This path and what is below it.
    pub path: UrlPath,
    /// The port of 127.0.0.1 that gets them.
    pub port: u16,
    /// Nobody is led there: somebody else would answer for the service, which is unavailable.
    pub closed: bool,
}

/// The routes of these entries. A version that was put back may claim what a neighbour has by now: the first keeps it.
pub fn of<'a>(entries: impl IntoIterator<Item = &'a Http>, closed: &BTreeSet<u16>) -> Vec<Route> {
    let mut claimed = BTreeSet::new();
    let entries =
        entries.into_iter().filter(|http| claimed.insert((http.domain.as_str(), http.path.as_str())));
    let route = |http: &Http| {
        let port = http.internal_port.get();
        let (domain, path) = (http.domain.clone(), http.path.clone());
        Route { domain, path, port, closed: closed.contains(&port) }
    };
    entries.map(route).collect()
}
