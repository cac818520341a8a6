//! The host's agent. One pass compares what is with what should be and changes the difference: [`pass`] runs
//! it, [`observe`] looks, [`plan`] decides, [`apply`] acts, [`state`] is what remains.

// Modules below name it as their sibling.
use crate::systemd;

pub mod admin;
pub mod applied;
pub mod apply;
pub mod caddy;
pub mod follow;
pub mod intent;
pub mod lines;
pub mod listeners;
pub mod live;
pub mod lock;
pub mod machine;
pub mod observe;
pub mod overlap;
pub mod overrides;
pub mod pass;
pub mod plan;
mod reading;
pub mod root;
pub mod state;
pub mod unit;
