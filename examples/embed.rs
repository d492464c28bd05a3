//! Serves one VM from a program of one's own, until the program is interrupted.

use std::error::Error;
use vhost_user_vsock::{Cid, Vm, VmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let config = VmConfig::new(Cid::try_from(4u32)?, "/tmp/vhost4.socket", "/tmp/vm4.vsock");
    let _vm = Vm::start(&config)?;
    println!("Connect a VMM to /tmp/vhost4.socket, and a host program to /tmp/vm4.vsock");
    loop {
        std::thread::park();
    }
}
