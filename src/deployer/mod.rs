//! The host agent.

pub mod root;
pub mod state;
