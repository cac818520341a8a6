//! The plan, performed on a model of a machine until there is nothing left to do: one property at a time, and in any order
//! of events. The plan is the real one.

mod cases;
mod machine;
mod order;
#[path = "../common/random.rs"]
mod random;
