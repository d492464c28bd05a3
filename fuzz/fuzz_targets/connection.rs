#![no_main]

use vhost_user_vsock_fuzz::connection;

libfuzzer_sys::fuzz_target!(
    init: {
        // A Rust program ignores SIGPIPE from its start; one that libFuzzer starts does not.
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, Default::default()).unwrap();
    },
    |bytes: &[u8]| connection::run(bytes)
);
