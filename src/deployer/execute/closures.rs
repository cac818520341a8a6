//! Closures: roots against the garbage collector, and one copy of all that is missing.

use super::{Round, remove_all, steps};
use crate::deployer::outcome::Outcome;
use crate::deployer::plan::{ServicePlan, Step};
use crate::durable::{self, Batch};
use crate::error::{Error, Result};
use crate::names::StorePath;
use crate::{log, nix};
use std::collections::BTreeMap;
use std::time::Instant;

/// Roots come first, so that no collection can come between.
pub(super) fn root(round: &Round) -> Outcome {
    let mut done = Outcome::default();
    let mut rooting = Vec::new();
    let mut batch = Batch::default();
    for (service, step) in steps(&round.plan.services) {
        let Step::Root(path) = step else { continue };
        let dir = round.at.root.roots(&service.name);
        let link = dir.join(path.base());
        let made = durable::folder(&dir, 0o755);
        if made.is_ok() {
            batch.symlink(path.as_ref(), &link);
        }
        rooting.push((service, path, link, made.err()));
    }
    let mut failed = batch.finish();
    for (service, path, link, not_made) in rooting {
        if let (Some(e), Some(goal)) = (not_made.or_else(|| failed.remove(&link)), &service.goal) {
            done.fail_on_host(&service.name, goal, &Error::from(e));
        } else if service.goal.as_ref().is_none_or(|g| g.is_verified() || g.path != *path) {
            log::notice(format!("{}: {path} had lost its root and has one again", service.name));
        }
    }
    done
}

/// All closures in one copy.
pub(super) fn fetch(round: &Round) -> Outcome {
    let mut done = Outcome::default();
    let mut missing: BTreeMap<&StorePath, Vec<&str>> = BTreeMap::new();
    for (service, step) in steps(&round.plan.services) {
        if let Step::Fetch(path) = step {
            missing.entry(path).or_default().push(service.name.as_str());
        }
    }
    if missing.is_empty() {
        // Also what a pass that died has left of something that was taken back since.
        if round.so_far.unfetchable.is_empty() {
            nix::forget_transfers();
        }
        return done;
    }
    let settings = round.at.settings;
    log::info(format!("fetching {} closure(s) from {}", missing.len(), settings.cache));
    let begun = Instant::now();
    let paths: Vec<StorePath> = missing.keys().map(|p| (*p).clone()).collect();
    match nix::fetch(settings, &paths, &round.at.root.run_dir) {
        Ok(failures) => {
            for (path, names) in missing {
                let names = names.join(", ");
                match failures.get(path) {
                    None => {
                        log::info(format!(
                            "{names}: fetched {path} ({:.1} s)",
                            begun.elapsed().as_secs_f64()
                        ));
                    }
                    Some(why) => {
                        log::error(format!("{names}: {why}"));
                        done.unfetchable.insert(path.clone(), why.to_string());
                    }
                }
            }
        }
        // Nix itself is missing or broken: true for each of them, and no reason to stop what runs.
        Err(e) => {
            done.unfetchable.extend(paths.into_iter().map(|path| (path, e.to_string())));
            log::error(e);
        }
    }
    done
}

/// Lets go of paths; what the disk does not take is left to the next pass.
pub(super) fn unroot(round: &Round) -> Outcome {
    let mut done = Outcome::default();
    done.wrote(let_go(round, &round.plan.services));
    done
}

pub(super) fn unroot_gone(round: &Round) -> Outcome {
    Outcome::of(|_| let_go(round, &round.plan.gone))
}

/// A service's folder goes with its last path.
fn let_go(round: &Round, services: &[ServicePlan]) -> Result<()> {
    let goes = |service: &ServicePlan, base: &String| {
        // What still stops runs from there.
        !round.so_far.pending.contains_key(&service.name)
            && service.steps.contains(&Step::Unroot(base.clone()))
    };
    let links = steps(services).filter_map(|(service, step)| match step {
        Step::Unroot(base) if goes(service, base) => Some(round.at.root.roots(&service.name).join(base)),
        _ => None,
    });
    remove_all(links)?;
    for service in services.iter().filter(|s| s.goal.is_none()) {
        let Some(held) = round.at.observed.roots.get(&service.name) else { continue };
        let rooted = service.steps.iter().any(|step| matches!(step, Step::Root(_)));
        if !rooted && held.iter().all(|base| goes(service, base)) {
            // Somebody else may have put something there: it is theirs.
            durable::remove_folder(&round.at.root.roots(&service.name))?;
        }
    }
    Ok(())
}
