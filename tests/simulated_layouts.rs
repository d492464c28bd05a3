//! Byte-exact transfer through rings and buffers of every layout.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::scope;

use common::daemon::Daemon;
use common::sim::host::{assert_same, dial, listen, pattern, read_ok};
use common::sim::memory::Backing;
use common::sim::ring::{Indirect, feature};
use common::sim::{GuestStack, GuestStream, HeaderPlace, Setup, SimGuest, TxLayout, host};

const PORT: u32 = 1234;

/// Sends and receives `len` bytes at once on both ends; then the host closes, the guest confirms.
fn exchange(mut host: UnixStream, mut guest: GuestStream, seed: u64, len: usize) {
    let (to_host, to_guest) = (pattern(seed, len), pattern(!seed, len));
    scope(|s| {
        let mut host_reader = host.try_clone().unwrap();
        let mut guest_reader = guest.handle();
        s.spawn(|| guest.write_all(&to_host).unwrap());
        s.spawn(|| host.write_all(&to_guest).unwrap());
        let wanted = &to_guest;
        s.spawn(move || {
            let mut got = vec![0; len];
            guest_reader.read_exact(&mut got).unwrap();
            assert_same(&got, wanted);
        });
        let mut got = vec![0; len];
        host_reader.read_exact(&mut got).unwrap();
        assert_same(&got, &to_host);
    });
    drop(host);
    assert_eq!(guest.read(&mut [0]).unwrap(), 0, "more than was sent");
    guest.wait_gone();
}

/// `count` connections at once, half of them opened by either side.
fn exchange_many(daemon: &Daemon, setup: Setup, count: usize, len: usize) {
    let stack = GuestStack::new(SimGuest::start(daemon, setup));
    stack.listen(PORT);
    let listener = listen(daemon, PORT);
    scope(|s| {
        for i in 0..count {
            let (host, guest) = if i % 2 == 0 {
                let host = dial(daemon, PORT);
                let guest = stack.accept(PORT);
                read_ok(&host);
                (host, guest)
            } else {
                let guest = stack.connect(PORT).unwrap();
                (host::accept(&listener), guest)
            };
            s.spawn(move || exchange(host, guest, i as u64, len));
        }
    });
}

fn run(setup: Setup, count: usize, len: usize) {
    exchange_many(&Daemon::start(), setup, count, len);
}

const BARE: u64 = 0;
const BOTH: u64 = feature::EVENT_IDX | feature::INDIRECT_DESC;

/// Every combination of ring features, with this many bytes each.
fn with_features(setup: Setup, count: usize, len: usize) {
    for features in [
        BARE,
        feature::EVENT_IDX,
        feature::INDIRECT_DESC,
        BOTH,
        BOTH | feature::IN_ORDER,
    ] {
        for indirect in [Indirect::No, Indirect::Whole, Indirect::Tail] {
            if indirect != Indirect::No && features & feature::INDIRECT_DESC == 0 {
                continue;
            }
            println!("features {features:#x}, {indirect:?}");
            let setup = Setup {
                features,
                indirect,
                ..setup.clone()
            };
            run(setup, count, len);
        }
    }
}

#[test]
fn one_connection_from_each_side() {
    run(Setup::default(), 2, 8 << 20);
}

#[test]
fn a_hundred_connections_at_once() {
    run(Setup::default(), 100, 200_000);
}

#[test]
fn every_set_of_ring_features() {
    with_features(Setup::default(), 4, 300_000);
}

#[test]
fn every_set_of_ring_features_with_linux_6_1_buffers() {
    let setup = Setup {
        rx: vec![44, 4096],
        ..Setup::default()
    };
    with_features(setup, 4, 300_000);
}

#[test]
fn rings_of_8_to_1024() {
    for exponent in 3..=10 {
        for features in [BARE, BOTH] {
            let setup = Setup {
                ring_size: 1 << exponent,
                features,
                ..Setup::default()
            };
            println!("{} entries, features {features:#x}", setup.ring_size);
            run(setup, 4, 400_000);
        }
    }
}

#[test]
fn packets_in_1_to_18_descriptors() {
    for header in [
        HeaderPlace::Alone,
        HeaderPlace::Together,
        HeaderPlace::Split,
    ] {
        for descriptors in 1..=18 {
            for indirect in [Indirect::No, Indirect::Whole, Indirect::Tail] {
                let setup = Setup {
                    tx: TxLayout {
                        header,
                        descriptors,
                    },
                    indirect,
                    ring_size: 64,
                    ..Setup::default()
                };
                println!("{descriptors} descriptors, header {header:?}, {indirect:?}");
                run(setup, 2, 300_000);
            }
        }
    }
}

#[test]
fn small_packets_in_18_descriptors() {
    let setup = Setup {
        tx: TxLayout {
            header: HeaderPlace::Together,
            descriptors: 18,
        },
        tx_payload: 23,
        ..Setup::default()
    };
    run(setup, 4, 40_000);
}

#[test]
fn rx_buffers_of_200_bytes_to_4_kib() {
    let layouts: [&[u32]; 10] = [
        &[200],
        &[777],
        &[1500],
        &[3776],
        &[4096],
        &[44, 4096],
        &[44, 156],
        &[20, 24, 156],
        &[100, 1, 1000, 7, 2000],
        &[10; 20],
    ];
    for rx in layouts {
        for features in [BARE, BOTH] {
            let setup = Setup {
                rx: rx.to_vec(),
                features,
                indirect: if features == BOTH {
                    Indirect::Whole
                } else {
                    Indirect::No
                },
                ..Setup::default()
            };
            println!("RX buffers of {rx:?}, features {features:#x}");
            run(setup, 4, 200_000);
        }
    }
}

#[test]
fn rx_buffers_for_a_header_and_one_byte() {
    let setup = Setup {
        rx: vec![45],
        ..Setup::default()
    };
    run(setup, 2, 5000);
}

#[test]
fn a_single_rx_buffer() {
    let setup = Setup {
        rx_buffers: Some(1),
        ..Setup::default()
    };
    run(setup, 4, 200_000);
}

#[test]
fn buffers_across_region_borders() {
    let layouts: [(&[u32], usize, usize); 4] = [
        (&[3776], 2, 65_536),
        (&[44, 4096], 2, 10_000),
        (&[4140], 1, 3000),
        (&[20, 3000, 24], 7, 65_536),
    ];
    for (rx, descriptors, tx_payload) in layouts {
        for header in [HeaderPlace::Alone, HeaderPlace::Together] {
            let setup = Setup {
                rx: rx.to_vec(),
                tx: TxLayout {
                    header,
                    descriptors,
                },
                tx_payload,
                ring_size: 32,
                ..Setup::default()
            };
            println!("RX {rx:?}, TX {tx_payload} in {descriptors}, header {header:?}");
            run(setup.with_borders(), 4, 400_000);
        }
    }
}

#[test]
fn huge_pages() {
    let setup = Setup {
        backing: Backing::HugePages,
        ..Setup::default()
    };
    run(setup, 4, 1 << 20);
}

#[test]
fn guests_with_little_buffer_space() {
    for buf_alloc in [1, 100, 4096, 65_536, 1 << 20, u32::MAX] {
        let setup = Setup {
            buf_alloc,
            cap_in_flight: true,
            ..Setup::default()
        };
        println!("buf_alloc {buf_alloc}");
        run(
            setup,
            2,
            if buf_alloc == 1 {
                300
            } else {
                300_000.min(buf_alloc as usize * 50)
            },
        );
    }
}

#[test]
fn daemons_with_other_transmit_buffers() {
    for size in ["4096", "65536", "1048576"] {
        let daemon = Daemon::start_with(&["--tx-buffer-size", size]);
        println!("--tx-buffer-size {size}");
        exchange_many(&daemon, Setup::default(), 4, 500_000);
    }
}
