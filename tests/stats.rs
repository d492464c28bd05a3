//! The statistics: what the stats socket answers, and what the `stats` command makes of it.

mod common;

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use common::daemon::{Daemon, GUEST_CID, binary, eventually};
use common::sim::host::{
    FLOW, PORT, accept, assert_closed, assert_moves_bytes, assert_serves, connect, dial, fill,
    from_guest, from_host, read_to_end,
};
use common::sim::{Flow, Op, Setup, SimGuest};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, connect as connect_socket,
    listen as listen_again, socket,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A daemon with a stats socket.
struct Monitored {
    daemon: Daemon,
    path: PathBuf,
    _folder: TempDir,
}

impl Monitored {
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

    /// The answer to a GET by HTTP, header and body.
    fn get(&self, path: &str) -> (String, String) {
        let mut stream = connect(&self.path);
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let answer = String::from_utf8(read_to_end(&stream)).unwrap();
        let (header, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(header.starts_with("HTTP/1.1 200 OK\r\n"), "{header}");
        let length = format!("Content-Length: {}", body.len());
        assert!(header.contains(&length), "{header}");
        (header.to_owned(), body.to_owned())
    }

    /// The sum of all samples with this name and these labels.
    fn number(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let name = format!("vhost_user_vsock_{name}");
        let text = self.text();
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let samples = samples.map(Sample::parse).filter(|sample| {
            let has = |(key, value): &(&str, &str)| sample.labels.get(key) == Some(value);
            sample.name == name && labels.iter().all(has)
        });
        samples.map(|sample| sample.value).sum()
    }

    #[track_caller]
    fn assert_number(&self, name: &str, labels: &[(&str, &str)], wanted: u64) {
        eventually(&format!("{name}{labels:?} to be {wanted}"), || {
            self.number(name, labels) == wanted
        });
    }
}

/// A line of the Prometheus text: `name value` or `name{label="value",...} value`.
struct Sample<'t> {
    name: &'t str,
    labels: HashMap<&'t str, &'t str>,
    value: u64,
}

impl<'t> Sample<'t> {
    fn parse(line: &'t str) -> Self {
        let try_parse = || {
            let (key, value) = line.rsplit_once(' ')?;
            let (name, labels) = match key.split_once('{') {
                Some((name, labels)) => (name, labels.strip_suffix('}')?),
                None => (key, ""),
            };
            let label = |label: &'t str| {
                let (key, value) = label.split_once('=')?;
                Some((key, value.strip_prefix('"')?.strip_suffix('"')?))
            };
            let labels = labels.split(',').filter(|label| !label.is_empty());
            Some(Self {
                name,
                labels: labels.map(label).collect::<Option<_>>()?,
                value: value.parse().ok()?,
            })
        };
        try_parse().unwrap_or_else(|| panic!("not a sample: {line:?}"))
    }
}

/// The daemon's clients are descriptors of this process.
fn allow_many_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65_536), hard).unwrap();
}

fn ports(flow: &Flow) -> [(&'static str, String); 2] {
    [
        ("guest_port", flow.guest_port.to_string()),
        ("host_port", flow.host_port.to_string()),
    ]
}

#[test]
fn what_happens_is_counted() {
    let monitored = Monitored::start(&[]);
    monitored.assert_number("vmm_connected", &[], 0);
    monitored.assert_number("driver_started", &[], 0);
    // The daemon was tried out.
    let clients = monitored.number("clients_total", &[]);
    let mut guest = monitored.device();
    monitored.assert_number("vmm_connected", &[], 1);
    monitored.assert_number("driver_started", &[], 1);
    monitored.assert_number("vmm_sessions_total", &[], 1);

    let stream = from_guest(&monitored.daemon, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    let (client, theirs, _) = from_host(&monitored.daemon, &mut guest, 99);
    monitored.assert_number("connections", &[], 2);
    monitored.assert_number("connections_opened_total", &[("by", "guest")], 1);
    monitored.assert_number("connections_opened_total", &[("by", "host")], 1);
    monitored.assert_number("clients_total", &[], clients + 1);
    monitored.assert_number("payload_bytes_total", &[("from", "guest")], 300);
    monitored.assert_number("payload_bytes_total", &[("from", "host")], 300);
    let ports = ports(&FLOW);
    let labels = [
        (ports[0].0, ports[0].1.as_str()),
        (ports[1].0, ports[1].1.as_str()),
        ("from", "guest"),
    ];
    monitored.assert_number("connection_payload_bytes_total", &labels, 300);
    assert!(monitored.number("packets_total", &[("from", "guest")]) >= 3);
    assert!(monitored.number("packets_total", &[("from", "host")]) >= 3);
    assert!(monitored.number("kicks_total", &[]) > 0);
    assert!(monitored.number("interrupts_total", &[]) > 0);

    guest.send(&FLOW.packet(Op::Rst));
    monitored.assert_number("connections_ended_total", &[("how", "guest_reset")], 1);
    let resets = monitored.number("resets_total", &[]);
    guest.send(&theirs.packet(Op::Request));
    assert_closed(&client);
    monitored.assert_number("connections_ended_total", &[("how", "protocol")], 1);
    monitored.assert_number("resets_total", &[], resets + 1);
    monitored.assert_number("connections", &[], 0);

    drop(guest);
    monitored.assert_number("vmm_connected", &[], 0);
    drop(monitored.device());
    monitored.assert_number("vmm_sessions_total", &[], 2);
}

#[test]
fn refusals_and_drops_are_counted() {
    let monitored = Monitored::start(&[]);
    let dropped = monitored.number("clients_dropped_total", &[]);
    let mut guest = monitored.device();
    guest.send(&FLOW.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &FLOW);
    monitored.assert_number("connections_refused_total", &[], 1);

    let client = dial(&monitored.daemon, 5);
    let request = guest.recv();
    let flow = Flow::new(5, request.src_port);
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&client);
    monitored.assert_number("connections_ended_total", &[("how", "refused")], 1);

    let mut garbage = connect(&monitored.daemon.uds_path());
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_closed(&garbage);
    monitored.assert_number("clients_dropped_total", &[], dropped + 1);

    let mut foreign = FLOW.packet(Op::Request);
    foreign.src_cid = 77;
    guest.send(&foreign);
    monitored.assert_number("foreign_packets_total", &[], 1);
}

#[test]
fn calls_that_fail_are_counted_by_reason() {
    let monitored = Monitored::start(&["--max-connections=1"]);
    let failed = |by, reason| {
        let labels = [("by", by), ("reason", reason)];
        monitored.number("calls_failed_total", &labels)
    };
    let assert_failed = |by, reason, wanted| {
        let what = format!("{wanted} {reason} by {by}");
        eventually(&what, || failed(by, reason) == wanted);
    };
    // Without a guest, the daemon may close before the line is written.
    let call = |port: u32| {
        let mut stream = connect(&monitored.daemon.uds_path());
        let _ = stream.write_all(format!("CONNECT {port}\n").as_bytes());
        stream
    };
    let tried_out = failed("host", "no_vmm");
    assert_closed(&call(5));
    assert_failed("host", "no_vmm", tried_out + 1);

    let mut guest = SimGuest::connect(&monitored.daemon, Setup::default());
    monitored.assert_number("vmm_connected", &[], 1);
    assert_closed(&call(5));
    assert_failed("host", "no_driver", 1);

    guest.post_rx();
    guest.start_rings();
    monitored.assert_number("driver_started", &[], 1);
    let client = dial(&monitored.daemon, 5);
    let request = guest.recv();
    guest.send(&Flow::new(5, request.src_port).packet(Op::Rst));
    assert_closed(&client);
    assert_failed("host", "nobody_listens", 1);
    guest.send(&FLOW.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &FLOW);
    assert_failed("guest", "nobody_listens", 1);

    let mut garbage = connect(&monitored.daemon.uds_path());
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_closed(&garbage);
    assert_failed("host", "no_line", 1);

    let _one = from_host(&monitored.daemon, &mut guest, 99);
    assert_closed(&dial(&monitored.daemon, 98));
    assert_failed("host", "limit", 1);
    assert_eq!(failed("host", "other") + failed("host", "timeout"), 0);

    let page = String::from_utf8(show(&monitored.path).stdout).unwrap();
    let line = page.lines().find(|line| line.starts_with("failed calls"));
    let line = line.unwrap_or_else(|| panic!("{page}"));
    for part in [
        "by the guest: 1 nobody listens;",
        "1 no driver, ",
        "1 limit",
    ] {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn the_side_that_keeps_the_other_waiting_is_named() {
    let monitored = Monitored::start(&[]);
    let mut guest = monitored.device();
    let _unread = from_guest(&monitored.daemon, &mut guest, &FLOW);
    let sent = fill(&mut guest, &FLOW);
    monitored.assert_number("connection_info", &[("waits_for", "host")], 1);
    assert!(monitored.number("connection_buffered_bytes", &[]) > 0);
    monitored.assert_number(
        "payload_bytes_total",
        &[("from", "guest")],
        sent.len() as u64,
    );

    let flow = Flow {
        buf_alloc: 1000,
        ..Flow::new(FLOW.guest_port + 1, PORT + 1)
    };
    let mut stream = from_guest(&monitored.daemon, &mut guest, &flow);
    stream.write_all(&[1; 1001]).unwrap();
    monitored.assert_number("connection_info", &[("waits_for", "guest")], 1);
    monitored.assert_number("credit_stalls_total", &[], 1);
}

#[test]
fn the_text_keeps_the_rules_of_prometheus() {
    let monitored = Monitored::start(&[]);
    let mut guest = monitored.device();
    let _stream = from_guest(&monitored.daemon, &mut guest, &FLOW);
    let text = monitored.text();
    let mut names = HashSet::new();
    for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
        let words: Vec<&str> = line.split(' ').collect();
        let (name, kind) = (words[2], words[3]);
        assert!(names.insert(name), "{name} is described twice");
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
    let monitored = Monitored::start(&[]);
    for path in ["/metrics", "/", "/json/", "/jsonl"] {
        let (header, body) = monitored.get(path);
        assert!(
            header.contains("Content-Type: text/plain; version=0.0.4"),
            "{header}"
        );
        let cid = format!("{{cid=\"{GUEST_CID}\"}}");
        let line = format!("vhost_user_vsock_vmm_connected{cid} 0\n");
        assert!(body.contains(&line), "{body}");
        let version = env!("CARGO_PKG_VERSION");
        let line = format!("vhost_user_vsock_build_info{{version=\"{version}\"}} 1\n");
        assert!(body.contains(&line), "{body}");
    }
}

#[test]
fn connections_have_series_where_they_are_asked_for() {
    let monitored = Monitored::start(&[]);
    let mut guest = monitored.device();
    let _stream = from_guest(&monitored.daemon, &mut guest, &FLOW);
    monitored.assert_number("connections", &[], 1);
    let port = format!("guest_port=\"{}\"", FLOW.guest_port);
    for (path, listed) in [
        ("/metrics", false),
        ("/", false),
        ("/metrics?connections=0", false),
        ("/metrics?connections", false),
        ("/metrics?connections=1", true),
        ("/metrics?a=b&connections=1", true),
    ] {
        let (_, body) = monitored.get(path);
        assert_eq!(body.contains(&port), listed, "{path}: {body}");
        assert!(body.contains("_connections{"), "{path}: {body}");
    }
    assert!(monitored.text().contains(&port));
    for (option, listed) in [("--format=prometheus", false), ("--connections", true)] {
        let output = Command::new(binary())
            .args(["stats", "--format=prometheus", option])
            .arg(&monitored.path)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.contains(&port), listed, "{option}: {text}");
    }
}

#[test]
fn json_is_answered_where_it_is_asked_for() {
    let monitored = Monitored::start(&[]);
    let mut guest = monitored.device();
    let stream = from_guest(&monitored.daemon, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    monitored.assert_number("payload_bytes_total", &[("from", "guest")], 300);
    let (header, body) = monitored.get("/json");
    assert!(
        header.contains("Content-Type: application/json"),
        "{header}"
    );
    let json: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(json["vms"].as_array().unwrap().len(), 1, "{body}");
    let vm = &json["vms"][0];
    assert_eq!(vm["cid"], GUEST_CID);
    assert_eq!(vm["vmm_connected"], true);
    assert_eq!(vm["driver_started"], true);
    assert_eq!(vm["handshaking"], 0);
    let counters = &vm["counters"];
    assert_eq!(counters["sessions"], 1);
    assert_eq!(counters["from_guest"]["bytes"], 300);
    assert_eq!(counters["to_guest"]["bytes"], 300);
    assert_eq!(
        counters["opened"],
        json!({"guest": 1, "host": 0, "sibling": 0})
    );
    assert_eq!(counters["ended"]["evicted"], 0);
    assert_eq!(vm["connections"].as_array().unwrap().len(), 1, "{body}");
    let connection = &vm["connections"][0];
    assert_eq!(connection["guest_port"], FLOW.guest_port);
    assert_eq!(
        connection["peer"],
        json!({"cid": 2, "port": FLOW.host_port})
    );
    assert_eq!(connection["state"], "established");
    assert_eq!(connection["from_guest"], 300);
    assert_eq!(connection["to_guest"], 300);
    assert_eq!(connection["buffered"], 0);
    assert!(connection["credit"].is_u64(), "{connection}");
    assert!(connection["age"].is_u64(), "{connection}");
    assert!(connection["waits_for"].is_null(), "{connection}");
}

#[test]
fn clients_of_any_kind_keep_nobody_from_an_answer() {
    let monitored = Monitored::start(&[]);
    let silent: Vec<UnixStream> = (0..3).map(|_| connect(&monitored.path)).collect();
    let mut endless = connect(&monitored.path);
    endless.write_all(&[b'x'; 100_000]).unwrap_or_default();
    drop(connect(&monitored.path));
    monitored.assert_number("vmm_connected", &[], 0);
    for mut stream in silent {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(
            text.contains("vmm_connected"),
            "a client that sends nothing is answered too"
        );
    }
    monitored.daemon.assert_idle();
}

#[test]
fn a_thousand_silent_clients_delay_nobody() {
    allow_many_descriptors();
    let monitored = Monitored::start(&[]);
    // One after the other, each with the time that it may take for a request, they would take minutes.
    let silent: Vec<UnixStream> = (0..1000).map(|_| connect(&monitored.path)).collect();
    let (_, body) = monitored.get("/metrics");
    assert!(body.contains("vmm_connected"), "{body}");
    for stream in &silent {
        let text = String::from_utf8(read_to_end(stream)).unwrap();
        assert!(
            text.contains("vmm_connected"),
            "a client that sends nothing is answered too"
        );
    }
    monitored.daemon.assert_idle();
}

#[test]
fn clients_that_come_while_descriptors_are_short_are_answered_later() {
    let monitored = Monitored::start(&[]);
    monitored.assert_number("vmm_connected", &[], 0);
    let (open, _) = monitored.daemon.at_rest();
    monitored.daemon.set_limit("nofile", open);
    let waiting = connect(&monitored.path);
    let complaints = || {
        let log = monitored.daemon.log();
        log.lines()
            .filter(|line| line.contains("stats socket"))
            .count()
    };
    eventually("the shortage to be logged", || complaints() > 0);
    monitored.daemon.assert_idle();
    monitored.daemon.set_limit("nofile", open + 100);
    let text = String::from_utf8(read_to_end(&waiting)).unwrap();
    assert!(text.contains("vmm_connected"), "{text}");
    assert_eq!(complaints(), 1, "{}", monitored.daemon.log());
}

/// Opens that many connections from the guest.
fn open(monitored: &Monitored, guest: &mut SimGuest, connections: u32) -> Vec<UnixStream> {
    let flows = (0..connections).map(|port| Flow::new(port + 1, port % 1000 + 1));
    flows
        .map(|flow| from_guest(&monitored.daemon, guest, &flow))
        .collect()
}

#[test]
fn a_thousand_connections_are_reported() {
    allow_many_descriptors();
    let monitored = Monitored::start(&[]);
    let mut guest = monitored.device();
    let streams = open(&monitored, &mut guest, 1000);
    monitored.assert_number("connections", &[], 1000);
    monitored.assert_number("connection_info", &[], 1000);
    drop(streams);
}

#[test]
fn the_memory_for_long_answers_is_given_back() {
    allow_many_descriptors();
    let monitored = Monitored::start(&["--max-connections=3000"]);
    let mut guest = monitored.device();
    let _streams = open(&monitored, &mut guest, 3000);
    let before = monitored.daemon.anonymous_kib();
    for _ in 0..10 {
        assert_eq!(monitored.number("connection_info", &[]), 3000);
        let (_, json) = monitored.get("/json");
        assert_eq!(json.matches("guest_port").count(), 3000);
    }
    let after = monitored.daemon.anonymous_kib();
    assert!(after <= before + 1024, "{before} KiB before, {after} after");
}

fn show(path: &Path) -> Output {
    Command::new(binary())
        .arg("stats")
        .arg(path)
        .output()
        .unwrap()
}

#[test]
fn a_table_is_shown() {
    let monitored = Monitored::start(&[]);
    let mut guest = monitored.device();
    let stream = from_guest(&monitored.daemon, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    let output = show(&monitored.path);
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
    let monitored = Monitored::start(&[]);
    for watch in ["--watch", "--watch=1"] {
        let mut shown = Command::new(binary())
            .args(["stats", watch])
            .arg(&monitored.path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(shown.stdout.take().unwrap()).lines();
        let pages = lines
            .map(Result::unwrap)
            .inspect(|line| assert!(!line.contains('\x1b'), "{line:?} is for no terminal"))
            .filter(|line| line.contains("no VMM"));
        assert_eq!(pages.take(2).count(), 2, "{watch}");
        shown.kill().unwrap();
        shown.wait().unwrap();
    }
}

#[test]
fn a_path_where_nobody_listens_is_a_failure_in_one_line() {
    assert_fails(Path::new("/nowhere/at/all"), "No such file");
}

/// Panics unless `stats` for this path fails with one line that names the path and this reason.
#[track_caller]
fn assert_fails(path: &Path, reason: &str) {
    let output = show(path);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty());
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let opening = format!("vhost-user-vsock: {}: ", path.display());
    assert!(stderr.starts_with(&opening), "{stderr}");
    assert!(stderr.contains(reason), "{stderr}");
}

/// Another program's socket. Its one client is given to `serve`.
fn another_program(
    folder: &TempDir,
    serve: impl FnOnce(UnixStream) + Send + 'static,
) -> (PathBuf, thread::JoinHandle<()>) {
    let path = folder.path().join("socket");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let serving = thread::spawn(move || serve(accept(&listener)));
    (path, serving)
}

#[test]
fn an_answer_that_is_not_a_daemons_is_a_failure() {
    let folder = TempDir::with_prefix("vsock-test-").unwrap();
    let ok = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n";
    let not_found = "HTTP/1.1 404 Not Found\r\n\r\n";
    for (answer, reason) in [
        (String::new(), "HTTP"),
        ("220 mail.example.org ready\r\n".into(), "HTTP"),
        ("\0".repeat(5000), "HTTP"),
        (format!("nonsense {ok}"), "HTTP"),
        ("HTTP/1.1 200 OK\r\n".into(), "HTTP"),
        (not_found.to_owned() + r#"{"vms":[]}"#, "200"),
        (ok.into(), "JSON"),
        (ok.to_owned() + "# HELP up\nup 1\n", "JSON"),
        (ok.to_owned() + "{}", "JSON"),
        (ok.to_owned() + "[]", "JSON"),
        (ok.to_owned() + r#"{"vms":[{"cid":4}]}"#, "JSON"),
        (ok.to_owned() + r#"{"vms":["#, "JSON"),
        (ok.to_owned() + r#"{"vms":[]}{}"#, "JSON"),
        (ok.to_owned() + r#"{"vms":[]}"#, "no VM"),
    ] {
        let (path, serving) = another_program(&folder, move |mut stream| {
            let mut request = [0; 1024];
            assert!(stream.read(&mut request).unwrap() > 0);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        assert_fails(&path, reason);
        serving.join().unwrap();
    }
}

#[test]
fn the_socket_for_host_programs_is_not_a_stats_socket() {
    let daemon = Daemon::start();
    assert_fails(&daemon.uds_path(), "not the stats socket");
}

#[test]
fn the_socket_for_the_vmm_is_not_a_stats_socket() {
    let daemon = Daemon::start();
    assert_fails(&daemon.vhost_socket(), "not the stats socket");
    // While a VMM is there, the next one waits.
    let mut guest = SimGuest::start(&daemon, Setup::default());
    assert_fails(&daemon.vhost_socket(), "no answer");
    assert_serves(&daemon, &mut guest);
    daemon.assert_alive();
}

#[test]
fn an_answer_without_end_is_a_failure() {
    let folder = TempDir::with_prefix("vsock-test-").unwrap();
    let (path, serving) =
        another_program(
            &folder,
            |mut stream| {
                while stream.write_all(&[b'x'; 65536]).is_ok() {}
            },
        );
    assert_fails(&path, "does not end");
    serving.join().unwrap();
}

#[test]
fn no_answer_is_a_failure() {
    let folder = TempDir::with_prefix("vsock-test-").unwrap();
    let path = folder.path().join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    assert_fails(&path, "no answer");
}

#[test]
fn a_backlog_that_stays_full_is_a_failure() {
    let folder = TempDir::with_prefix("vsock-test-").unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    listen_again(&listener, Backlog::new(0).unwrap()).unwrap();
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let mut waiting = Vec::new();
    let refusal = loop {
        let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        match connect_socket(client.as_raw_fd(), &UnixAddr::new(&path).unwrap()) {
            Ok(()) => waiting.push(client),
            Err(error) => break error,
        }
    };
    assert_eq!(refusal, Errno::EAGAIN);
    assert_fails(&path, "no answer");
}

#[test]
fn a_closed_pipe_ends_the_output_silently() {
    let monitored = Monitored::start(&[]);
    for arguments in [&["stats"][..], &["stats", "--watch=1"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(binary())
            .args(arguments)
            .arg(&monitored.path)
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stderr}");
        assert_eq!(stderr, "", "{arguments:?}");
    }
}
