//! The CONNECT line in the spellings of other programs and VMMs.

mod common;

use std::io::Write;

use common::daemon::Daemon;
use common::sim::host::{
    assert_closed, assert_moves_bytes, assert_same, connect, device, read_ok, recv_bytes,
};
use common::sim::{Flow, Op, SimGuest};

/// The guest port of all these lines.
const PORT: u32 = 1234;

/// As documented, as Kata Containers writes it, and as Firecracker and Cloud Hypervisor accept it.
const UNDERSTOOD: [&[u8]; 16] = [
    b"CONNECT 1234\n",
    b"connect 1234\n",
    b"Connect 1234\n",
    b"cOnNeCt 1234\n",
    b"CONNECT  1234\n",
    b"CONNECT        1234\n",
    b"CONNECT 1234 \n",
    b"CONNECT 1234    \n",
    b"CONNECT 1234\r\n",
    b"CONNECT 1234 \r\n",
    b"connect 1234\r\n",
    b"connect  1234 \n",
    b"Connect   1234  \r\n",
    b"CONNECT 01234\n",
    // 32 bytes with the newline: the longest line.
    b"CONNECT                    1234\n",
    b"connect 1234                  \r\n",
];

const REFUSED: [&[u8]; 38] = [
    b"\n",
    b"\r\n",
    b" \n",
    b"CONNECT\n",
    b"CONNECT \n",
    b"CONNECT  \n",
    b"CONNECT\r\n",
    b"CONNECT \r\n",
    b"CONNECT x\n",
    b"CONNECT 5x\n",
    b"CONNECT x5\n",
    b"CONNECT 5 6\n",
    b"CONNECT 5  x\n",
    b"CONNECT 5 \r6\n",
    b"CONNECT 5\r6\n",
    // A caller's address is for sibling sockets only.
    b"CONNECT 5 3:1024\n",
    b" CONNECT 5\n",
    b"\rCONNECT 5\n",
    b"CONNECT\t5\n",
    b"CONNECT5\n",
    b"CONN ECT 5\n",
    b"CONNECTED 5\n",
    b"CONNEC 5\n",
    b"connects 5\n",
    b"DISCONNECT 5\n",
    b"connec\xf4 5\n",
    b"CONNECT -5\n",
    b"CONNECT +5\n",
    b"CONNECT 0x5\n",
    b"CONNECT 5.0\n",
    b"CONNECT 5\0\n",
    b"CONNECT \r5\n",
    b"CONNECT 4294967296\n",
    b"CONNECT 99999999999999999999\n",
    b"CONNECT 18446744073709551621\n",
    b"GET / HTTP/1.1\r\n\r\n",
    // 33 bytes.
    b"CONNECT                     1234\n",
    b"connect 1234                   \r\n",
];

/// Writes `pieces` one by one. The guest receives a REQUEST for the port and, after its RESPONSE, the payload.
#[track_caller]
fn assert_connects(daemon: &Daemon, guest: &mut SimGuest, pieces: &[&[u8]], payload: &[u8]) {
    let mut stream = connect(&daemon.uds_path());
    let mut requests = Vec::new();
    for piece in pieces {
        stream.write_all(piece).unwrap();
        if pieces.len() > 1 {
            // Each piece is read separately: the guest's packets keep the daemon working in between.
            requests.extend(guest.settle());
        }
    }
    requests.extend(requests.is_empty().then(|| guest.recv()));
    let flow = Flow::new(PORT, requests[0].src_port);
    requests[0].assert_is(Op::Request, &flow);
    assert_eq!(requests.len(), 1, "{requests:?}");
    guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&stream), flow.host_port);
    assert_same(&recv_bytes(guest, &flow, payload.len()), payload);
    assert_moves_bytes(guest, &stream, &flow);
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&stream);
}

#[test]
fn every_spelling_is_understood() {
    let (daemon, mut guest) = device();
    for line in UNDERSTOOD {
        println!("{:?}", line.escape_ascii().to_string());
        assert_connects(&daemon, &mut guest, &[line], b"");
    }
}

#[test]
fn bytes_after_any_spelling_are_payload() {
    let (daemon, mut guest) = device();
    for line in UNDERSTOOD {
        println!("{:?}", line.escape_ascii().to_string());
        // Blanks and newlines after the line are payload.
        for payload in [
            &b"payload"[..],
            b" ",
            b"\n",
            b"\r\n",
            b"\nCONNECT 5\n",
            b"5",
        ] {
            let bytes = [line, payload].concat();
            assert_connects(&daemon, &mut guest, &[&bytes], payload);
        }
    }
}

#[test]
fn every_spelling_is_understood_byte_by_byte() {
    let (daemon, mut guest) = device();
    for line in UNDERSTOOD {
        println!("{:?}", line.escape_ascii().to_string());
        let (head, newline) = line.split_at(line.len() - 1);
        let last = [newline, b"payload"].concat();
        let mut pieces: Vec<_> = head.chunks(1).collect();
        pieces.push(&last);
        assert_connects(&daemon, &mut guest, &pieces, b"payload");
    }
}

#[test]
fn a_line_that_names_no_port_is_closed() {
    let (daemon, mut guest) = device();
    for line in REFUSED {
        println!("{:?}", line.escape_ascii().to_string());
        let mut stream = connect(&daemon.uds_path());
        stream.write_all(line).unwrap();
        assert_closed(&stream);
    }
    assert!(guest.settle().is_empty(), "the guest heard of it");
}
