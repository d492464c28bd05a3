use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use tempfile::TempDir;

use super::counters::{
    CallFailure, CloseReason, ConnectionStats, Counters, Side, Snapshot, Traffic, VmSnapshot,
};
use super::prometheus::Connections;
use super::{json, prometheus, socket};
use crate::packet::header::{Cid, GuestPort, PeerAddr};

/// A VM with connections whose ports count from 1.
fn vm(cid: u64, connections: u32) -> VmSnapshot {
    let connection = |port| ConnectionStats {
        guest_port: GuestPort(port),
        peer: PeerAddr::host(port + 1),
        seqpacket: false,
        state: "established".into(),
        from_guest: 3,
        to_guest: 4,
        buffered: 5,
        credit: 6,
        waits_for: Some(Side::Host),
        age: Some(12),
    };
    let counters = Counters {
        sessions: 1,
        from_guest: Traffic {
            packets: 7,
            bytes: 8,
        },
        opened: [9, 10, 11],
        ended: [1, 2, 3, 4, 5, 6, 7, 8, 9],
        failed: [[1, 2, 3, 4, 5, 6, 7], [8; 7], [9; 7]],
        shortages: 11,
        ..Counters::default()
    };
    VmSnapshot {
        cid: Cid::from_raw(cid),
        vmm_connected: true,
        driver_started: true,
        handshaking: 2,
        waiting: 0,
        counters,
        connections: (1..=connections).map(connection).collect(),
    }
}

fn text(snapshot: &Snapshot) -> String {
    let chunks = prometheus::chunks(Rc::new(snapshot.clone()), Connections::Listed);
    chunks.map(Result::unwrap).collect()
}

fn samples(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.starts_with('#'))
}

/// No sample is there twice, which a reader would refuse.
#[track_caller]
fn assert_distinct(text: &str) {
    let series = samples(text).filter_map(|sample| sample.rsplit_once(' '));
    let mut series: Vec<&str> = series.map(|(series, _)| series).collect();
    let count = series.len();
    series.sort_unstable();
    series.dedup();
    assert_eq!(series.len(), count, "{text}");
}

#[test]
fn json_in_chunks_is_the_json_of_the_whole() {
    let several = [vec![], vec![vm(3, 0)], vec![vm(3, 2), vm(4, 0), vm(5, 1)]];
    for snapshot in several.map(Snapshot::new) {
        let chunks = json::chunks(Rc::new(snapshot.clone()));
        let text: String = chunks.map(Result::unwrap).collect();
        assert_eq!(text, serde_json::to_string(&snapshot).unwrap());
        assert_eq!(
            serde_json::from_str::<Snapshot>(&text).unwrap(),
            snapshot,
            "{text}"
        );
    }
}

#[test]
fn json_has_names_for_sides_and_reasons() {
    let json = serde_json::to_value(vm(3, 1)).unwrap();
    for side in Side::ALL {
        let expected = vm(3, 1).counters.opened[side as usize];
        assert_eq!(json["counters"]["opened"][side.name()], expected);
    }
    for reason in CloseReason::ALL {
        let expected = vm(3, 1).counters.ended[reason as usize];
        assert_eq!(json["counters"]["ended"][reason.name()], expected);
    }
    for (side, counts) in Side::ALL.into_iter().zip(vm(3, 1).counters.failed) {
        for (failure, expected) in CallFailure::ALL.into_iter().zip(counts) {
            let count = &json["counters"]["failed"][side.name()][failure.name()];
            assert_eq!(*count, expected, "{side:?} {failure:?}");
        }
    }
    assert_eq!(json["connections"][0]["waits_for"], Side::Host.name());
}

#[test]
fn json_of_another_version_is_understood() {
    let json = r#"{"vms": [{"cid": 3, "vmm_connected": false, "handshaking": 0, "new": [],
        "counters": {"sessions": 1, "ended": {"done": 2, "new": 3}, "new": 4,
            "failed": {"host": {"limit": 5, "new": 6}, "new": {}}},
        "connections": []}], "new": null}"#;
    let expected = Counters {
        sessions: 1,
        ended: [2, 0, 0, 0, 0, 0, 0, 0, 0],
        failed: [[0; 7], [0, 0, 0, 5, 0, 0, 0], [0; 7]],
        ..Counters::default()
    };
    let snapshot: Snapshot = serde_json::from_str(json).unwrap();
    assert_eq!(snapshot.vms[0].counters, expected);
}

#[test]
fn samples_carry_the_cid() {
    let one = text(&Snapshot::from(vm(3, 2)));
    let both = text(&Snapshot::new(vec![vm(3, 2), vm(4, 1)]));
    let of_vms = |line: &&str| !line.contains("build_info");
    for line in samples(&one).filter(of_vms) {
        assert!(line.contains("{cid=\"3\""), "{line}");
    }
    for line in samples(&both).filter(of_vms) {
        assert!(
            line.contains("{cid=\"3\"") ^ line.contains("{cid=\"4\""),
            "{line}"
        );
    }
    assert_eq!(
        both.matches("# TYPE").count(),
        one.matches("# TYPE").count(),
        "a metric is described once, whatever the number of VMs"
    );
    let line =
        "vhost_user_vsock_connection_buffered_bytes{cid=\"4\",guest_port=\"1\",host_port=\"2\"} 5";
    assert!(samples(&both).any(|sample| sample == line), "{both}");
}

#[test]
fn both_types_with_the_same_ports_are_told_apart() {
    let mut vm = vm(3, 2);
    for (conn, seqpacket) in vm.connections.iter_mut().zip([false, true]) {
        conn.guest_port = GuestPort(80);
        conn.peer = PeerAddr::host(7);
        conn.seqpacket = seqpacket;
    }
    let text = text(&Snapshot::from(vm));
    let name = "vhost_user_vsock_connection_buffered_bytes";
    for type_label in ["", ",type=\"seqpacket\""] {
        let line = format!("{name}{{cid=\"3\",guest_port=\"80\",host_port=\"7\"{type_label}}} 5");
        assert!(samples(&text).any(|sample| sample == line), "{text}");
    }
}

#[test]
fn siblings_with_the_same_port_are_told_apart() {
    let mut vm = vm(3, 2);
    for (conn, cid) in vm.connections.iter_mut().zip([5, 6]) {
        conn.guest_port = GuestPort(80);
        conn.peer = PeerAddr {
            cid: Cid::from_raw(cid),
            ..PeerAddr::host(7)
        };
    }
    let text = text(&Snapshot::from(vm));
    let name = "vhost_user_vsock_connection_buffered_bytes";
    let labels = "guest_port=\"80\",host_port=\"7\"";
    for cid in [5, 6] {
        let line = format!("{name}{{cid=\"3\",{labels},peer_cid=\"{cid}\"}} 5");
        assert!(samples(&text).any(|sample| sample == line), "{text}");
    }
}

#[test]
fn a_daemon_that_repeats_itself_spoils_nothing() {
    let mut repeated = vm(3, 2);
    repeated.connections[1] = repeated.connections[0].clone();
    let snapshot = Snapshot::new(vec![repeated.clone(), repeated]);
    let daemons = vec![("a".into(), Some(snapshot))];
    let text = prometheus::merged(daemons, Connections::Listed);
    assert_distinct(&text);
}

#[test]
fn merged_daemons_have_names_and_spoil_nothing() {
    let mut hostile = vm(3, 1);
    hostile.connections[0].state = "\"} 1\nother 2\\".into();
    let old = Snapshot {
        version: None,
        vms: vec![vm(3, 0)],
    };
    let daemons = vec![
        ("a".into(), Some(Snapshot::from(hostile))),
        ("b".into(), Some(old)),
        ("c".into(), None),
    ];
    let summed = prometheus::merged(daemons.clone(), Connections::Summed);
    let text = prometheus::merged(daemons, Connections::Listed);
    assert!(!summed.contains("guest_port") && text.starts_with(&summed));
    let build = "vhost_user_vsock_build_info{";
    let builds: Vec<&str> = samples(&text)
        .filter(|line| line.starts_with(build))
        .collect();
    let version = env!("CARGO_PKG_VERSION");
    let of_a = format!("{build}name=\"a\",version=\"{version}\"}} 1");
    assert_eq!(builds, [of_a], "an older daemon does not say");
    assert_distinct(&text);
    for line in [
        r#"vhost_user_vsock_up{name="a"} 1"#,
        r#"vhost_user_vsock_up{name="c"} 0"#,
        r#"vhost_user_vsock_driver_started{name="a",cid="3"} 1"#,
        r#"vhost_user_vsock_driver_started{name="b",cid="3"} 1"#,
    ] {
        assert!(samples(&text).any(|sample| sample == line), "{text}");
    }
    let escaped = r#"state="\"} 1\nother 2\\",waits_for="host"} 1"#;
    assert!(samples(&text).any(|line| line.ends_with(escaped)), "{text}");
    assert!(samples(&text).all(|line| line.starts_with("vhost_user_vsock_")));
}

#[test]
fn a_text_of_many_connections_is_never_whole_in_memory() {
    let snapshot = Rc::new(Snapshot::from(vm(3, 10_000)));
    for chunks in [
        prometheus::chunks(snapshot.clone(), Connections::Listed),
        json::chunks(snapshot.clone()),
    ] {
        let longest = chunks.map(|chunk| chunk.unwrap().len()).max();
        assert!(longest < Some(4096), "{longest:?}");
    }
}

/// The request for the longest text.
const ALL: &str = "GET /metrics?connections=1 HTTP/1.1\r\n\r\n";

/// How long a client in these tests waits for its answer.
const PATIENCE: Duration = Duration::from_secs(20);

fn ask(path: &Path, request: &str) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

/// A stats socket whose answers are longer than what a socket buffers.
fn serve_long_answers(directory: &TempDir) -> (std::path::PathBuf, Snapshot) {
    let path = directory.path().join("stats");
    let snapshot = Snapshot::from(vm(3, 2000));
    let served = snapshot.clone();
    socket::serve(UnixListener::bind(&path).unwrap(), move || served.clone()).unwrap();
    (path, snapshot)
}

#[test]
fn a_client_that_reads_gets_its_answer_beside_hundreds_that_do_not() {
    let directory = TempDir::new().unwrap();
    let (path, snapshot) = serve_long_answers(&directory);
    let whole = text(&snapshot);
    let _not_reading: Vec<UnixStream> = (0..300).map(|_| ask(&path, ALL)).collect();
    let mut answer = String::new();
    let mut reading = ask(&path, ALL);
    reading.read_to_string(&mut answer).unwrap();
    let (header, body) = answer.split_once("\r\n\r\n").unwrap();
    let length = format!("Content-Length: {}", whole.len());
    assert!(header.contains(&length), "{header}");
    assert!(body == whole, "{} bytes of {}", body.len(), whole.len());
}

#[test]
fn a_client_that_reads_slowly_gets_all_of_it() {
    let directory = TempDir::new().unwrap();
    let (path, snapshot) = serve_long_answers(&directory);
    let mut stream = ask(&path, "");
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = vec![0; 1000];
    stream.read_exact(&mut answer).unwrap();
    // Others are served while this one's answer waits.
    let mut other = String::new();
    let mut reading = ask(&path, "GET /json HTTP/1.1\r\n\r\n");
    reading.read_to_string(&mut other).unwrap();
    let json = other.split_once("\r\n\r\n").unwrap().1;
    assert!(serde_json::from_str::<Snapshot>(json).unwrap() == snapshot);
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer == text(&snapshot).as_bytes());
}
