//! The route: as a plan has it, and between the phases.

use super::{Round, Situation};
use crate::deployer::caddy::{self, CaddyState, RoutePlan};
use crate::deployer::outcome::Outcome;
use crate::deployer::plan;
use crate::deployer::routes::{self, Route};
use crate::deployer::state::{RouteState, RouteStatus};
use crate::log;
use crate::manifest::Http;
use crate::names::ServiceName;
use std::collections::BTreeMap;

/// Gives Caddy the route of a plan; how it stands then.
pub(super) fn write(round: &Round) -> Outcome {
    let pending = |reason: String| RouteState { status: RouteStatus::Pending, reason: Some(reason) };
    let current = RouteState { status: RouteStatus::Current, reason: None };
    let (changed, route) = match round.route {
        RoutePlan::None => (false, RouteState::default()),
        RoutePlan::Current => (false, current),
        RoutePlan::Pending(reason) => {
            log::warning(format!("route: {reason}"));
            (false, pending(reason.clone()))
        }
        RoutePlan::Write(requests) => {
            let route = match caddy::perform(&round.at.settings.caddy_admin, requests) {
                Err(why) => {
                    log::error(format!("route: {why}; the next pass tries again"));
                    pending(why)
                }
                Ok(()) if round.plan.routes.is_empty() => RouteState::default(),
                Ok(()) => current,
            };
            (true, route)
        }
    };
    Outcome { changed, route: Some(route), ..Outcome::default() }
}

impl Situation<'_> {
    /// Leads requests, if Caddy does not have it already, to these candidates, and for all other services to what was last
    /// known to be good; whether it worked, and what Caddy has then.
    pub(super) fn lead(
        &self,
        candidates: &BTreeMap<&ServiceName, &Http>,
    ) -> (Result<(), String>, CaddyState) {
        let admin = &self.settings.caddy_admin;
        let route = caddy::route(&self.interim_routes(candidates));
        let plan =
            |seen: &CaddyState| caddy::plan(self.settings.caddy_server.as_deref(), route.as_ref(), seen);
        let asked = match plan(&caddy::observe(admin)) {
            RoutePlan::None | RoutePlan::Current => Ok(()),
            RoutePlan::Pending(why) => Err(why),
            RoutePlan::Write(requests) => caddy::perform(admin, &requests),
        };
        // Also of what failed: the answer may have been lost to a change that was made, and what follows must know.
        let now = caddy::observe(admin);
        let led = asked.or_else(|why| match plan(&now) {
            RoutePlan::None | RoutePlan::Current => Ok(()),
            RoutePlan::Pending(_) | RoutePlan::Write(_) => Err(why),
        });
        (led, now)
    }

    /// What was never known to be good is led to where it will be.
    fn interim_routes(&self, candidates: &BTreeMap<&ServiceName, &Http>) -> Vec<Route> {
        let desired = self.desired.iter().filter(|s| s.artifact.store_path.path().is_some());
        let entries =
            desired.filter_map(|s| match (candidates.get(&s.name), self.persisted.applied.get(&s.name)) {
                (Some(http), _) => Some(*http),
                (None, Some(good)) => good.service.http.as_ref(),
                (None, None) => s.http.as_ref(),
            });
        routes::of(entries, &plan::closed(self.desired, self.observed, self.persisted))
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
