//! What the benchmark shares with the tests: guest memory, the vhost-user frontend, the proxy for a UML kernel.

// It uses a part of each.
#![allow(dead_code)]

#[path = "../../tests/common/sim/memory.rs"]
pub mod memory;
#[path = "../../tests/common/uml_proxy.rs"]
pub mod uml_proxy;
#[path = "../../tests/common/sim/vhost_user.rs"]
pub mod vhost_user;
