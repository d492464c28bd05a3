//! Shared by the tests: the daemon as a process, and the guests that use it.

// Every test file compiles this module and uses a part of it.
#![allow(dead_code)]

pub mod daemon;
pub mod guest;
pub mod handover;
pub mod host;
pub mod manager;
pub mod messages;
pub mod qemu;
pub mod scenarios;
pub mod siblings;
pub mod sim;
pub mod ssh;
pub mod tracer;
pub mod uml;
pub mod uml_proxy;
pub mod watchdog;
