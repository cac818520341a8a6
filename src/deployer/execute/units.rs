//! Units: written, started at boot, stopped, removed. Only units with our mark, or that are gone but came up once, are
//! touched.

use super::{EVERYBODY_WAITS, Round, remove_all, steps, still_stopping, with_goal};
use crate::deployer::observe;
use crate::deployer::observed::UnitFile;
use crate::deployer::outcome::Outcome;
use crate::deployer::plan::{Goal, ServicePlan, Step};
use crate::deployer::root::Root;
use crate::durable::{self, Batch};
use crate::error::{Error, Result};
use crate::files::if_there;
use crate::log;
use crate::names::ServiceName;
use crate::systemd;

/// Stops what is paused and keeps it from starting at boot; its unit stays.
pub(super) fn pause(round: &Round) -> Outcome {
    let pauses = steps(&round.plan.services).filter(|(_, step)| matches!(step, Step::Pause));
    // What could not be taken down before is not begun.
    let begun = pauses
        .map(|(service, _)| service)
        .filter(|service| service.goal.as_ref().is_none_or(|goal| !round.has_failed(&service.name, goal)));
    let names: Vec<&ServiceName> = begun.map(|service| &service.name).collect();
    Outcome::of(|done| {
        for name in &names {
            log::notice(format!("{name}: stopping (paused)"));
            not_at_boot(round.at.root, name)?;
        }
        let stopping = systemd::stop(&units_of(&names), EVERYBODY_WAITS)?;
        for name in names.iter().filter(|name| stopping.contains(&name.unit())) {
            done.pend(name, still_stopping(name), name, false);
        }
        done.changed = !names.is_empty();
        Ok(())
    })
}

/// Removes those of these services that go: what was rejected and has no version before it, what waits again, and what is
/// not in the manifest any more.
pub(super) fn remove(round: &Round, services: &[ServicePlan]) -> Outcome {
    Outcome::of(|done| remove_units(round, services, done))
}

fn remove_units(round: &Round, services: &[ServicePlan], done: &mut Outcome) -> Result<()> {
    let root = round.at.root;
    let removed = steps(services).filter_map(|(service, step)| match step {
        Step::Remove(why) => Some((&service.name, *why)),
        _ => None,
    });
    let mut going: Vec<(&ServiceName, &str)> = removed.collect();
    if going.is_empty() {
        return Ok(());
    }
    for (name, why) in &going {
        log::notice(format!("{name}: removing ({why})"));
    }
    // A unit that was deleted by hand leaves its process and its boot link, which are ours as well.
    let is_ours = |name: &&ServiceName| match round.at.observed.units.get(*name).map(|u| &u.file) {
        Some(UnitFile::Ours(_)) => true,
        Some(UnitFile::Absent) => round.at.persisted.applied.contains_key(*name),
        Some(UnitFile::Foreign(_)) | None => false,
    };
    let mut ours: Vec<&ServiceName> = going.iter().map(|(name, _)| *name).filter(is_ours).collect();
    // Stop before deleting: a unit without a file keeps its process and cannot be restarted.
    let stopping = systemd::stop(&units_of(&ours), EVERYBODY_WAITS)?;
    for (name, _) in going.iter().filter(|(name, _)| stopping.contains(&name.unit())) {
        not_at_boot(root, name)?;
        log::warning(format!("{name}: {}; the next pass removes it", still_stopping(name)));
        done.pend(name, still_stopping(name), name, false);
    }
    going.retain(|(name, _)| !stopping.contains(&name.unit()));
    ours.retain(|name| !stopping.contains(&name.unit()));
    // What would start it, before what it is started from.
    remove_all(ours.iter().map(|name| root.boot_link(name)))?;
    remove_all(ours.iter().map(|name| root.unit(name)))?;
    for copy in ours.iter().flat_map(|name| observe::shadow_copies(root, name)) {
        durable::remove(&copy)?;
    }
    if !ours.is_empty() {
        systemd::daemon_reload()?;
        systemd::reset_failed(&units_of(&ours))?;
    }
    // Last: while it is remembered as good, an interrupted removal is begun anew.
    remove_all(going.iter().map(|(name, _)| root.applied(name)))?;
    done.records.extend(going.iter().map(|(name, _)| ((*name).clone(), None)));
    done.changed = true;
    Ok(())
}

/// Writes all units, and takes away what would stand in for them.
pub(super) fn write(round: &Round) -> Outcome {
    let root = round.at.root;
    let write = |step: &Step| matches!(step, Step::Write(_));
    let all: Vec<(&ServiceName, &Goal)> = with_goal(round.plan, write).collect();
    Outcome::of(|done| {
        if all.is_empty() {
            return Ok(());
        }
        fs_err::create_dir_all(&root.unit_dir)?;
        let mut batch = Batch::default();
        all.iter().for_each(|(name, goal)| batch.write(&root.unit(name), goal.unit.as_bytes(), 0o644));
        let mut failed = batch.finish();
        for (name, goal) in &all {
            let written = failed.remove(&root.unit(name)).map_or(Ok(()), Err);
            if let Err(e) = written.and_then(|()| remove_shadow_copies(root, name)) {
                done.fail_on_host(name, goal, &Error::from(e));
            }
        }
        Ok(())
    })
}

fn remove_shadow_copies(root: &Root, name: &ServiceName) -> std::io::Result<()> {
    for copy in observe::shadow_copies(root, name) {
        log::notice(format!("{name}: removing {}, which would stand in for its unit", copy.display()));
        durable::remove(&copy)?;
    }
    Ok(())
}

/// Makes the links that start services at boot, but of those whose units could not be written.
pub(super) fn enable(round: &Round) -> Outcome {
    let root = round.at.root;
    let all = with_goal(round.plan, |step| matches!(step, Step::Enable));
    let all: Vec<(&ServiceName, &Goal)> = all.filter(|(name, goal)| !round.has_failed(name, goal)).collect();
    let mut done = Outcome::default();
    if all.is_empty() {
        return done;
    }
    let mut batch = Batch::default();
    let folder = durable::folder(&root.wants_dir(), 0o755).map_err(Error::from);
    if folder.is_ok() {
        all.iter().for_each(|(name, _)| batch.symlink(&root.unit(name), &root.boot_link(name)));
    }
    let mut failed = batch.finish();
    for (name, goal) in all {
        let linked = failed.remove(&root.boot_link(name)).map_or(Ok(()), |e| Err(e.into()));
        match folder.clone().and(linked) {
            Ok(()) => log::info(format!("{name}: started at boot from now on")),
            Err(e) => done.fail_on_host(name, goal, &e),
        }
    }
    done
}

fn not_at_boot(root: &Root, name: &ServiceName) -> Result<()> {
    if_there(durable::remove(&root.boot_link(name)))?;
    Ok(())
}

fn units_of(names: &[&ServiceName]) -> Vec<String> {
    names.iter().map(|name| name.unit()).collect()
}
