//! `list` and `stats --all`: every daemon below a directory.

mod common;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::daemon::{Daemon, GUEST_CID, binary, eventually};
use common::sim::host::{FLOW, assert_moves_bytes, from_guest};
use common::sim::{Setup, SimGuest};
use serde_json::Value;
use tempfile::TempDir;

/// A directory of daemons' directories, as the service has them.
struct Directory(TempDir);

impl Directory {
    fn new() -> Self {
        Self(TempDir::with_prefix("vsock-test-").unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Makes the directory of a daemon, and gives the path of a socket in it.
    fn socket(&self, name: &str, socket: &str) -> PathBuf {
        let directory = self.path().join(name);
        fs::create_dir_all(&directory).unwrap();
        directory.join(socket)
    }

    /// Starts a daemon whose directory has this name.
    fn start(&self, name: &str) -> Daemon {
        let stats = self.socket(name, "stats");
        Daemon::start_with(&[&format!("--stats-path={}", stats.display())])
    }

    /// Runs the program with this command, the directory and these options.
    fn run(&self, command: &str, options: &[&str]) -> String {
        run(
            command,
            &[&[self.path().to_str().unwrap()], options].concat(),
        )
    }

    fn list(&self) -> String {
        self.run("list", &[])
    }

    /// The words of the line of a daemon.
    #[track_caller]
    fn row(&self, name: &str) -> Vec<String> {
        let list = self.list();
        let row = list.lines().find(|line| line.trim().starts_with(name));
        let row = row.unwrap_or_else(|| panic!("no {name}: {list}"));
        row.split_whitespace().map(str::to_owned).collect()
    }

    /// The merged text, checked.
    fn metrics(&self) -> Metrics {
        Metrics::parse(&self.run("stats", &["--all", "--format=prometheus", "--connections"]))
    }
}

/// Runs the program, which must succeed in silence.
#[track_caller]
fn run(command: &str, arguments: &[&str]) -> String {
    let output = Command::new(binary())
        .arg(command)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert_eq!(stderr, "");
    String::from_utf8(output.stdout).unwrap()
}

/// A text in Prometheus' format, as a collector understands it.
struct Metrics {
    /// By name and sorted labels.
    samples: HashMap<(String, Vec<(String, String)>), f64>,
}

impl Metrics {
    /// Panics where the text breaks the rules of the format.
    fn parse(text: &str) -> Self {
        assert!(text.is_empty() || text.ends_with('\n'), "{text}");
        let (mut helped, mut typed) = (HashSet::new(), HashMap::new());
        let mut finished = HashSet::new();
        let mut current = String::new();
        let mut samples = HashMap::new();
        for line in text.lines() {
            let name = if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect(line);
                assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
                name.to_owned()
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect(line);
                assert!(["gauge", "counter"].contains(&kind), "{line}");
                assert_eq!(typed.insert(name.to_owned(), kind), None, "{line}");
                name.to_owned()
            } else {
                let (name, labels, value) = sample(line);
                assert!(typed.contains_key(&name), "{line} has no type");
                let sample = samples.insert((name.clone(), labels), value);
                assert_eq!(sample, None, "{line} is there twice");
                name
            };
            if name != current {
                assert!(finished.insert(name.clone()), "{name} is scattered");
                current = name;
            }
        }
        assert_eq!(helped.len(), typed.len());
        Self { samples }
    }

    /// The value of the sample that has these labels.
    #[track_caller]
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let name = format!("vhost_user_vsock_{name}");
        let mut labels: Vec<(String, String)> = labels
            .iter()
            .map(|(label, value)| (String::from(*label), String::from(*value)))
            .collect();
        labels.sort();
        let key = (name, labels);
        *self
            .samples
            .get(&key)
            .unwrap_or_else(|| panic!("no {key:?} in {:?}", self.samples.keys()))
    }
}

/// Parses `name{label="value",...} value`.
#[track_caller]
fn sample(line: &str) -> (String, Vec<(String, String)>, f64) {
    let end = line.find(['{', ' ']).expect(line);
    let (name, mut rest) = line.split_at(end);
    let is_plain = |c: char| c.is_ascii_lowercase() || c == '_';
    assert!(!name.is_empty() && name.chars().all(is_plain), "{line}");
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"").expect(line);
            assert!(!label.is_empty() && label.chars().all(is_plain), "{line}");
            let (value, after) = quoted(after).expect(line);
            labels.push((label.to_owned(), value));
            match after.strip_prefix(',') {
                Some(more) => rest = more,
                None => break rest = after.strip_prefix('}').expect(line),
            }
        }
    }
    labels.sort();
    let names: HashSet<&String> = labels.iter().map(|(label, _)| label).collect();
    assert_eq!(names.len(), labels.len(), "{line}");
    let value = rest.strip_prefix(' ').expect(line).parse().expect(line);
    (name.to_owned(), labels, value)
}

/// A value up to its closing quotation mark, and what follows that.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    loop {
        match characters.next()? {
            (index, '"') => return Some((value, &text[index + 1..])),
            (_, '\\') => value.push(match characters.next()?.1 {
                'n' => '\n',
                escaped @ ('\\' | '"') => escaped,
                _ => return None,
            }),
            (_, character) => value.push(character),
        }
    }
}

#[test]
fn every_daemon_has_a_line() {
    let directory = Directory::new();
    let (idle, busy) = (directory.start("10"), directory.start("9"));
    let cid = GUEST_CID.to_string();
    assert_eq!(
        directory.row("10"),
        ["10", &cid, "none", "none", "0", "0", "B", "0", "B"]
    );
    let mut guest = SimGuest::start(&busy, Setup::default());
    let stream = from_guest(&busy, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    let expected = [
        "9",
        &cid,
        "connected",
        "started",
        "1",
        "300",
        "B",
        "300",
        "B",
    ];
    eventually("the counters", || directory.row("9") == expected);
    let list = directory.list();
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!(lines.len(), 3, "{list}");
    assert!(lines[0].contains("NAME") && lines[0].contains("CID"));
    assert!(lines[1].trim().starts_with('9'), "CIDs have their order");

    drop(guest);
    eventually("the VMM to be gone", || {
        directory.row("9")[2..4] == ["none", "none"]
    });
    drop(idle);
}

#[test]
fn a_daemon_that_does_not_answer_is_shown_and_delays_nobody() {
    let directory = Directory::new();
    let _daemon = directory.start("web");
    // All of them at once take as long as one.
    let silent: Vec<UnixListener> = (0..40)
        .map(|index| {
            let path = directory.socket(&format!("silent-{index}"), "stats");
            UnixListener::bind(path).unwrap()
        })
        .collect();
    drop(UnixListener::bind(directory.socket("dead", "stats")).unwrap());
    let _host = UnixListener::bind(directory.socket("old", "vm.vsock")).unwrap();
    directory.socket("empty", "nothing");
    fs::write(directory.path().join("file"), "").unwrap();
    let list = directory.list();
    assert_eq!(list.lines().count(), 1 + 1 + silent.len() + 1 + 1, "{list}");
    assert_eq!(list.matches("unknown: no answer").count(), silent.len());
    let line = |name: &str| list.lines().find(|line| line.trim().starts_with(name));
    assert!(
        line("dead")
            .unwrap()
            .contains("unknown: Connection refused")
    );
    assert!(line("old").unwrap().contains("unknown: no stats socket"));
    assert!(line("web").unwrap().contains(" none "));
}

#[test]
fn no_daemon_is_an_empty_list_and_no_directory_a_failure() {
    let directory = Directory::new();
    assert_eq!(directory.list().lines().count(), 1);
    assert_eq!(
        directory.run("stats", &["--all", "--format=prometheus"]),
        ""
    );
    assert_eq!(directory.run("stats", &["--all"]), "");
    for arguments in [
        &["list", "/nowhere/at/all"][..],
        &["stats", "--all", "/nowhere/at/all"],
    ] {
        let output = Command::new(binary()).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("/nowhere/at/all: No such file"), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

#[test]
fn the_metrics_of_all_are_one_valid_text() {
    let directory = Directory::new();
    let (one, _other) = (directory.start("one"), directory.start("a \"b\"\\c"));
    drop(UnixListener::bind(directory.socket("dead", "stats")).unwrap());
    let mut guest = SimGuest::start(&one, Setup::default());
    let stream = from_guest(&one, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    let cid = GUEST_CID.to_string();
    let vm = [("name", "one"), ("cid", cid.as_str())];
    let sent = [vm[0], vm[1], ("from", "guest")];
    eventually("the bytes to be counted", || {
        directory.metrics().value("payload_bytes_total", &sent) == 300.0
    });
    let metrics = directory.metrics();
    assert_eq!(metrics.value("vmm_connected", &vm), 1.0);
    assert_eq!(metrics.value("driver_started", &vm), 1.0);
    // The name of the other one, as `list` shows it.
    let other = ("name", r#"a \"b\"\\c"#);
    assert_eq!(metrics.value("driver_started", &[other, vm[1]]), 0.0);
    let version = ("version", env!("CARGO_PKG_VERSION"));
    assert_eq!(metrics.value("build_info", &[vm[0], version]), 1.0);
    for (name, up) in [(vm[0], 1.0), (other, 1.0), (("name", "dead"), 0.0)] {
        assert_eq!(metrics.value("up", &[name]), up);
    }
    let ports = (FLOW.guest_port.to_string(), FLOW.host_port.to_string());
    let connection = [
        vm[0],
        vm[1],
        ("guest_port", ports.0.as_str()),
        ("host_port", ports.1.as_str()),
        sent[2],
    ];
    let bytes = metrics.value("connection_payload_bytes_total", &connection);
    assert_eq!(bytes, 300.0);
}

#[test]
fn the_statistics_of_all_come_as_pages_and_as_json() {
    let directory = Directory::new();
    let _daemon = directory.start("web");
    drop(UnixListener::bind(directory.socket("dead", "stats")).unwrap());
    let page = directory.run("stats", &["--all"]);
    let heading = format!("web (CID {GUEST_CID}): no VMM");
    assert!(page.contains(&heading), "{page}");
    assert!(page.contains("dead: Connection refused"), "{page}");
    let json = directory.run("stats", &["--all", "--format=json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let daemons = json["daemons"].as_array().unwrap();
    assert_eq!(daemons.len(), 2);
    assert_eq!(daemons[0]["name"], "dead");
    assert!(daemons[0]["error"].is_string());
    assert_eq!(daemons[0]["vms"].as_array().unwrap().len(), 0);
    assert_eq!(daemons[1]["name"], "web");
    assert!(daemons[1]["error"].is_null());
    assert_eq!(daemons[1]["vms"][0]["cid"], GUEST_CID);
    assert_eq!(daemons[1]["vms"][0]["driver_started"], false);
}

#[test]
fn one_daemon_has_the_other_formats_as_well() {
    let directory = Directory::new();
    let _daemon = directory.start("web");
    let stats = directory.socket("web", "stats");
    let stats = stats.to_str().unwrap();
    let text = run("stats", &[stats, "--format=prometheus"]);
    let cid = GUEST_CID.to_string();
    let metrics = Metrics::parse(&text);
    assert_eq!(metrics.value("vmm_connected", &[("cid", &cid)]), 0.0);
    let version = ("version", env!("CARGO_PKG_VERSION"));
    assert_eq!(metrics.value("build_info", &[version]), 1.0);
    let json = run("stats", &[stats, "--format=json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["vms"][0]["cid"], GUEST_CID);
}

/// The names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn the_output_file_is_replaced_as_a_whole() {
    let directory = Directory::new();
    let _daemon = directory.start("web");
    let collected = TempDir::new().unwrap();
    let file = collected.path().join("vsock.prom");
    fs::write(&file, "old\n").unwrap();
    // Whoever has it open keeps what it was.
    let mut old = fs::File::open(&file).unwrap();
    let command = format!(
        "umask 077; exec \"$0\" stats --all {} --format=prometheus --output={}",
        directory.path().display(),
        file.display()
    );
    let output = Command::new("sh")
        .args(["-c", &command])
        .arg(binary())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty());
    let mut text = String::new();
    std::io::Read::read_to_string(&mut old, &mut text).unwrap();
    assert_eq!(text, "old\n");
    let metrics = Metrics::parse(&fs::read_to_string(&file).unwrap());
    assert_eq!(metrics.value("up", &[("name", "web")]), 1.0);
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o644);
    assert_eq!(names(collected.path()), ["vsock.prom"]);
}

#[test]
fn a_file_that_cannot_be_replaced_stays_and_nothing_is_left_beside_it() {
    let directory = Directory::new();
    let collected = TempDir::new().unwrap();
    let in_the_way = collected.path().join("vsock.prom");
    fs::create_dir_all(in_the_way.join("kept")).unwrap();
    for file in [in_the_way.as_path(), Path::new("/nowhere/vsock.prom")] {
        let output = Command::new(binary())
            .args(["stats", "--all", "--output"])
            .arg(file)
            .arg(directory.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(file.to_str().unwrap()), "{stderr}");
    }
    assert_eq!(names(collected.path()), ["vsock.prom"]);
    assert_eq!(names(&in_the_way), ["kept"]);
}
