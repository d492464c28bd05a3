//! Counters, and how they are shown.

pub mod counters;
pub mod prometheus;
pub mod socket;
pub mod table;
