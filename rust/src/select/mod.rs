//! Which units go: the cheapest, until a target number of parameters is reached.

pub mod cross;
pub mod independent;
mod search;
pub mod streaming;
