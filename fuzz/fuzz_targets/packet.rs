#![no_main]

use vhost_user_vsock_fuzz::packet;

libfuzzer_sys::fuzz_target!(
    init: {
        // As the start of every Rust program does, and libFuzzer's does not.
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, Default::default()).unwrap();
    },
    |bytes: &[u8]| packet::run(bytes)
);
