//! The host's agent. One pass compares what is with what should be and changes the difference: [`pass`] runs
//! it, `source` says what should be, [`observe`] looks, [`plan`] decides, `execute` acts, `report` is what remains.

pub mod admin;
pub mod applied;
pub mod caddy;
mod execute;
pub mod follow;
pub mod intent;
pub mod lines;
pub mod listeners;
pub mod live;
pub mod machine;
pub mod observe;
pub mod observed;
pub mod outcome;
pub mod overrides;
pub mod pass;
pub mod persisted;
pub mod plan;
pub mod ports;
mod reading;
mod report;
pub mod reported;
pub mod root;
pub mod routes;
mod source;
pub mod state;
pub mod trial;
pub mod unit;
