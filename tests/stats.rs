//! What the daemon tells of itself: its counters over the stats socket, and the table that shows them.

mod common;

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::daemon::{Daemon, binary, eventually};
use common::sim::host::{
    FLOW, PORT, assert_closed, assert_moves_bytes, connect, dial, fill, from_guest, from_host,
    read_to_end,
};
use common::sim::{Flow, Op, Setup, SimGuest};
use prometheus_parse::{Scrape, Value};
use tempfile::TempDir;

/// A daemon that tells, and a guest.
struct Told {
    daemon: Daemon,
    path: PathBuf,
    _folder: TempDir,
}

impl Told {
    fn start(options: &[&str]) -> Self {
        let folder = TempDir::with_prefix("vsock-test-").unwrap();
        let path = folder.path().join("stats");
        let stats_path = format!("--stats-path={}", path.display());
        let daemon = Daemon::start_with(&[&[stats_path.as_str()], options].concat());
        Self {
            daemon,
            path,
            _folder: folder,
        }
    }

    fn device(&self) -> SimGuest {
        SimGuest::start(&self.daemon, Setup::default())
    }

    /// What `nc -U` gets.
    fn text(&self) -> String {
        let stream = connect(&self.path);
        stream.shutdown(Shutdown::Write).unwrap();
        String::from_utf8(read_to_end(&stream)).unwrap()
    }

    /// The number of all samples with this name, and with these labels.
    fn number(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let lines = self.text();
        let scrape = Scrape::parse(lines.lines().map(|line| Ok(line.to_owned()))).unwrap();
        let name = format!("vhost_user_vsock_{name}");
        let samples = scrape.samples.iter().filter(|sample| {
            let fits = |(key, value): &(&str, &str)| sample.labels.get(key) == Some(*value);
            sample.metric == name && labels.iter().all(fits)
        });
        let numbers = samples.map(|sample| match sample.value {
            Value::Counter(value) | Value::Gauge(value) => value as u64,
            _ => panic!("{name} is neither counter nor gauge"),
        });
        numbers.sum()
    }

    #[track_caller]
    fn assert_number(&self, name: &str, labels: &[(&str, &str)], wanted: u64) {
        eventually(&format!("{name}{labels:?} to be {wanted}"), || {
            self.number(name, labels) == wanted
        });
    }
}

fn ports(flow: &Flow) -> [(&'static str, String); 2] {
    [
        ("guest_port", flow.guest_port.to_string()),
        ("host_port", flow.host_port.to_string()),
    ]
}

#[test]
fn what_happens_is_counted() {
    let told = Told::start(&[]);
    told.assert_number("vmm_connected", &[], 0);
    let mut guest = told.device();
    told.assert_number("vmm_connected", &[], 1);
    told.assert_number("vmm_sessions_total", &[], 1);

    let stream = from_guest(&told.daemon, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    let (client, theirs, _) = from_host(&told.daemon, &mut guest, 99);
    told.assert_number("connections", &[], 2);
    told.assert_number("connections_opened_total", &[("by", "guest")], 1);
    told.assert_number("connections_opened_total", &[("by", "host")], 1);
    told.assert_number("clients_total", &[], 1);
    told.assert_number("payload_bytes_total", &[("from", "guest")], 300);
    told.assert_number("payload_bytes_total", &[("from", "host")], 300);
    let ports = ports(&FLOW);
    let labels = [
        (ports[0].0, ports[0].1.as_str()),
        (ports[1].0, ports[1].1.as_str()),
        ("from", "guest"),
    ];
    told.assert_number("connection_payload_bytes_total", &labels, 300);
    assert!(told.number("packets_total", &[("from", "guest")]) >= 3);
    assert!(told.number("packets_total", &[("from", "host")]) >= 3);
    assert!(told.number("kicks_total", &[]) > 0);
    assert!(told.number("interrupts_total", &[]) > 0);

    guest.send(&FLOW.packet(Op::Rst));
    told.assert_number("connections_ended_total", &[("how", "guest_reset")], 1);
    let resets = told.number("resets_total", &[]);
    guest.send(&theirs.packet(Op::Request));
    assert_closed(&client);
    told.assert_number("connections_ended_total", &[("how", "protocol")], 1);
    told.assert_number("resets_total", &[], resets + 1);
    told.assert_number("connections", &[], 0);

    drop(guest);
    told.assert_number("vmm_connected", &[], 0);
    drop(told.device());
    told.assert_number("vmm_sessions_total", &[], 2);
}

#[test]
fn refusals_and_drops_are_counted() {
    let told = Told::start(&[]);
    let mut guest = told.device();
    guest.send(&FLOW.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &FLOW);
    told.assert_number("connections_refused_total", &[], 1);

    let client = dial(&told.daemon, 5);
    let request = guest.recv();
    let flow = Flow::new(5, request.src_port);
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&client);
    told.assert_number("connections_ended_total", &[("how", "refused")], 1);

    let mut garbage = connect(&told.daemon.uds_path());
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_closed(&garbage);
    told.assert_number("clients_dropped_total", &[], 1);

    let mut foreign = FLOW.packet(Op::Request);
    foreign.src_cid = 77;
    guest.send(&foreign);
    told.assert_number("foreign_packets_total", &[], 1);
}

#[test]
fn it_is_told_who_waits_for_whom() {
    let told = Told::start(&[]);
    let mut guest = told.device();
    let _unread = from_guest(&told.daemon, &mut guest, &FLOW);
    let sent = fill(&mut guest, &FLOW);
    told.assert_number("connection_info", &[("waits_for", "host")], 1);
    assert!(told.number("connection_buffered_bytes", &[]) > 0);
    told.assert_number(
        "payload_bytes_total",
        &[("from", "guest")],
        sent.len() as u64,
    );

    let flow = Flow {
        buf_alloc: 1000,
        ..Flow::new(FLOW.guest_port + 1, PORT + 1)
    };
    let mut stream = from_guest(&told.daemon, &mut guest, &flow);
    stream.write_all(&[1; 1001]).unwrap();
    told.assert_number("connection_info", &[("waits_for", "guest")], 1);
    told.assert_number("credit_stalls_total", &[], 1);
}

#[test]
fn the_text_is_as_prometheus_wants_it() {
    let told = Told::start(&[]);
    let mut guest = told.device();
    let _stream = from_guest(&told.daemon, &mut guest, &FLOW);
    let text = told.text();
    let mut names = HashSet::new();
    for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
        let words: Vec<&str> = line.split(' ').collect();
        let (name, kind) = (words[2], words[3]);
        assert!(names.insert(name), "{name} stands twice");
        assert!(
            text.contains(&format!("# HELP {name} ")),
            "{name} has no help"
        );
        assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
        let is_plain = |c: char| c.is_ascii_lowercase() || c == '_';
        assert!(
            name.starts_with("vhost_user_vsock_") && name.chars().all(is_plain),
            "{name}"
        );
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        assert!(names.contains(name), "{line} has no type");
        let value = line.rsplit(' ').next().unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    assert!(names.len() > 20, "{text}");
}

#[test]
fn http_is_understood() {
    let told = Told::start(&[]);
    let mut stream = connect(&told.path);
    let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
    stream.write_all(request).unwrap();
    let answer = String::from_utf8(read_to_end(&stream)).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains("Content-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "{head}"
    );
    assert!(body.contains("vhost_user_vsock_vmm_connected 0"), "{body}");
}

#[test]
fn clients_of_any_kind_keep_nobody_from_being_told() {
    let told = Told::start(&[]);
    let silent: Vec<UnixStream> = (0..3).map(|_| connect(&told.path)).collect();
    let mut endless = connect(&told.path);
    endless.write_all(&[b'x'; 100_000]).unwrap_or_default();
    drop(connect(&told.path));
    told.assert_number("vmm_connected", &[], 0);
    for mut stream in silent {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(
            text.contains("vmm_connected"),
            "a client that says nothing is told too"
        );
    }
    told.daemon.assert_idle();
}

#[test]
fn a_thousand_connections_are_told() {
    let told = Told::start(&[]);
    let mut guest = told.device();
    let streams: Vec<UnixStream> = (0..1000)
        .map(|port| from_guest(&told.daemon, &mut guest, &Flow::new(port + 1, port + 1)))
        .collect();
    told.assert_number("connections", &[], 1000);
    told.assert_number("connection_info", &[], 1000);
    drop(streams);
}

fn show(path: &Path) -> std::process::Output {
    Command::new(binary())
        .arg("stats")
        .arg(path)
        .output()
        .unwrap()
}

#[test]
fn a_table_is_shown() {
    let told = Told::start(&[]);
    let mut guest = told.device();
    let stream = from_guest(&told.daemon, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    let output = show(&told.path);
    assert!(output.status.success());
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(page.contains("a VMM is connected, 1 so far"), "{page}");
    assert!(
        page.contains("connections: 1 now, 1 by the guest, 0 by host programs"),
        "{page}"
    );
    let row = page.lines().find(|line| line.contains("40000")).unwrap();
    let cells: Vec<&str> = row.split_whitespace().collect();
    let wanted = [
        "40000",
        "1234",
        "established",
        "300",
        "B",
        "300",
        "B",
        "0",
        "B",
    ];
    assert_eq!(cells[..wanted.len()], wanted, "{page}");
    assert_eq!(cells.last(), Some(&"nobody"), "{page}");
}

#[test]
fn a_table_is_shown_again_and_again() {
    let told = Told::start(&[]);
    for watch in ["--watch", "--watch=1"] {
        let mut shown = Command::new(binary())
            .args(["stats", watch])
            .arg(&told.path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(shown.stdout.take().unwrap()).lines();
        let pages = lines
            .map(Result::unwrap)
            .filter(|line| line.contains("no VMM"));
        assert_eq!(pages.take(2).count(), 2, "{watch}");
        shown.kill().unwrap();
        shown.wait().unwrap();
    }
}

#[test]
fn a_table_of_nobody_is_a_failure_in_one_line() {
    let output = show(Path::new("/nowhere/at/all"));
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.starts_with("vhost-user-vsock: /nowhere/at/all: "),
        "{stderr}"
    );
}
