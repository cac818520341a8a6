//! The route: as a plan has it, and between the phases.

use super::{Round, Situation};
use crate::deployer::caddy::{self, CaddyState, RoutePlan};
use crate::deployer::outcome::Outcome;
use crate::deployer::plan;
use crate::deployer::ports::{PortChanges, PortFiles};
use crate::deployer::routes::{self, Reached, Route};
use crate::deployer::state::{RouteState, RouteStatus};
use crate::log;
use crate::manifest::Http;
use crate::names::ServiceName;
use std::collections::BTreeMap;

/// Gives Caddy the route of a plan; how it stands then.
pub(super) fn write(round: &Round) -> Outcome {
    let pending = |reason: String| RouteState { status: RouteStatus::Pending, reason: Some(reason) };
    let current = RouteState { status: RouteStatus::Current, reason: None };
    let given = round.at.give(round.route, round.ports);
    let route = match (&given, round.route) {
        (Err(reason), RoutePlan::Pending(_)) => {
            log::warning(format!("route: {reason}"));
            pending(reason.clone())
        }
        (Err(why), _) => {
            log::error(format!("route: {why}; the next pass tries again"));
            pending(why.clone())
        }
        (Ok(_), _) if round.plan.routes.is_empty() => RouteState::default(),
        (Ok(_), _) => current,
    };
    let changed = matches!(round.route, RoutePlan::Write(_)) || !round.ports.is_empty();
    Outcome { changed, route: Some(route), ..Outcome::default() }
}

/// How requests were led elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moved {
    /// By files alone: every new request goes there.
    ByFiles,
    /// Perhaps by a change of Caddy's configuration: some clients may still come by the old one.
    ByChange,
}

/// Whether requests are led as they should be, or nobody can change that now.
pub(in crate::deployer) fn is_settled(route: &RoutePlan, ports: &PortChanges) -> bool {
    route.is_settled() && ports.is_empty()
}

impl Situation<'_> {
    /// Leads requests, if Caddy does not have it already, to these candidates, and for all other services to what was last
    /// known to be good; how, or why not, and what Caddy has then.
    pub(super) fn lead(
        &self,
        candidates: &BTreeMap<&ServiceName, &Http>,
    ) -> (Result<Moved, String>, CaddyState) {
        let admin = &self.settings.caddy_admin;
        let routes = self.interim_routes(candidates);
        let plan = |seen: &CaddyState| {
            // As they are now: this pass may have changed them since it looked.
            let files = self.observed.switching.files().and_then(|_| PortFiles::read(self.root));
            let route = caddy::route(&routes, files.as_ref());
            let route = caddy::plan(self.settings.caddy_server.as_deref(), route.as_ref(), seen);
            (route, files.map(|files| files.changes(&routes)).unwrap_or_default())
        };
        let (route, ports) = plan(&caddy::observe(admin));
        let given = self.give(&route, &ports);
        // Also of what failed: the answer may have been lost to a change that was made, and what follows must know.
        let now = caddy::observe(admin);
        let led = given.or_else(|why: String| match plan(&now) {
            (RoutePlan::None | RoutePlan::Current, ports) if ports.is_empty() => Ok(Moved::ByChange),
            _ => Err(why),
        });
        (led, now)
    }

    /// Leads requests as these say; the error is why they are not. A file must be there before Caddy reads it, and is
    /// removed after Caddy has stopped reading it.
    fn give(&self, route: &RoutePlan, ports: &PortChanges) -> Result<Moved, String> {
        let requests = match route {
            RoutePlan::Pending(why) => return Err(why.clone()),
            RoutePlan::None | RoutePlan::Current => &[][..],
            RoutePlan::Write(requests) => requests,
        };
        ports.write(self.root)?;
        caddy::perform(&self.settings.caddy_admin, requests)?;
        ports.remove();
        Ok(self.moved_by(route))
    }

    /// How requests are led elsewhere if this is what it takes.
    pub(super) fn moved_by(&self, route: &RoutePlan) -> Moved {
        match (self.observed.switching.files(), route) {
            (Some(_), RoutePlan::None | RoutePlan::Current) => Moved::ByFiles,
            _ => Moved::ByChange,
        }
    }

    /// What was never known to be good is led to where it will be.
    fn interim_routes(&self, candidates: &BTreeMap<&ServiceName, &Http>) -> Vec<Route> {
        let desired = self.desired.iter().filter(|s| s.artifact.store_path.path().is_some());
        let reached = desired.filter_map(|s| {
            let good = self.persisted.applied.get(&s.name);
            let now = good.map_or(s.http.as_ref(), |good| good.service.http.as_ref());
            let http = candidates.get(&s.name).copied().or(now)?;
            Some(Reached { service: &s.name, http, own: now.or(s.http.as_ref()) })
        });
        routes::of(reached, &plan::closed(self.desired, self.observed, self.persisted))
    }
}

/// Leads requests to services that have never been up, in one change for all of them: there is nothing older that
/// could answer. Candidates keep what they have. What Caddy does not take now, the end of the pass tries again.
pub(super) fn lead_to_first(round: &Round) {
    if !round.at.observed.caddy.is_available() {
        return;
    }
    let led = round.so_far.candidates.iter().filter(|(name, _)| round.so_far.led.contains(*name));
    if let Err(why) = round.at.lead(&led.map(|(name, (http, _))| (name, http)).collect()).0 {
        log::warning(format!("route: {why}"));
    }
}
