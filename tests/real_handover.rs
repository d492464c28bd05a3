//! Real Linux guests go on while their daemon is replaced, and lose nothing. When it dies they lose their connections, and
//! nothing else.

mod common;

#[path = "real_handover/traffic.rs"]
mod traffic;

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::daemon::eventually;
use common::guest::{Guest, installed};
use common::handover::{Service, Way};
use common::host::{HostProgram, new_port};
use common::messages;
use common::qemu::{Kernel, Memory, Qemu};
use common::scenarios::{self, Held, Opener, Transfer};
use common::sim::host::{accept, assert_closed, listen_for_messages, read_message};
use common::uml::Uml;
use traffic::{Callers, Chat, Messages, Session};

const MIB: usize = 1 << 20;

/// How often the daemon is replaced during a transfer.
const UPGRADES: usize = 10;

/// Ports of the guest's that have a plain socket.
const SSH: u32 = 22;
const IPERF3: u32 = 5201;

with_either_way! {
    a_guest_notices_none_of_ten_upgrades
    a_machine_is_paused_and_reset
}

fn start(way: Way) -> Service {
    let ssh = format!("--guest-port={SSH}={{}}/ssh");
    let iperf3 = format!("--guest-port={IPERF3}={{}}/iperf3");
    Service::start(way, &[&ssh, &iperf3])
}

fn a_guest_notices_none_of_ten_upgrades(way: Way) {
    const TOTAL: usize = 256 * MIB;
    let mut service = start(way);
    let guest = Uml::boot(&service);
    let mut session = Session::by_ssh(&guest, &service, SSH);
    let mut chat = Chat::start(&guest, &service);
    let messages = Messages::start(&guest, &service);
    let callers = Callers::start(&guest, &service);
    let opener = match way {
        Way::Manager => Opener::Guest,
        Way::Path => Opener::Host,
    };
    let transfer = Transfer::start(&guest, &service, opener, TOTAL, 65536);
    let begin = Instant::now();
    for upgrade in 1..=UPGRADES {
        transfer.wait_for(upgrade * TOTAL / (UPGRADES + 1));
        let before = Instant::now();
        service.hand_over();
        println!("upgrade {upgrade}: {:?}", before.elapsed());
        session.answers();
        chat.answers();
        messages.go_on();
    }
    transfer.finish();
    let [from_guest, from_host] = callers.finish();
    println!(
        "{:?}: {} messages, connections: {from_guest} of the guest's, {from_host} of the host's",
        begin.elapsed(),
        messages.finish()
    );
    session.finish();
    scenarios::driver_comes_back(&guest, &service);
    iperf3_goes_on(&guest, &mut service);
    service.hand_over();
    scenarios::works(&guest, &service);
}

/// `iperf3` in each direction, through socat at both ends, over some upgrades. In both at once it would need connections that are
/// accepted in the order in which they are made, and socats that fork make them in any.
fn iperf3_goes_on(guest: &Guest, service: &mut Service) {
    guest.run_ok("busybox ip link set lo up");
    let _servers = [
        guest.spawn("exec iperf3 -s -B 127.0.0.1"),
        guest.spawn(&format!(
            "exec socat VSOCK-LISTEN:{IPERF3},fork TCP:127.0.0.1:5201"
        )),
    ];
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let socket = service.directory().join("iperf3");
    let _socat = HostProgram::start(
        "socat",
        [
            // It says when a program leaves first.
            "-lf/dev/null".to_owned(),
            format!("TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr"),
            format!("UNIX-CONNECT:{}", socket.display()),
        ],
    );
    let iperf3 = |options: &[&str]| {
        let mut command = Command::new(installed("iperf3"));
        command
            .args(["-c", "127.0.0.1", "-p", &port.to_string()])
            .args(options)
            .stdout(Stdio::piped());
        command
    };
    eventually("iperf3's server", || {
        let tried = iperf3(&["-n", "1K"]).stderr(Stdio::null()).output();
        tried.unwrap().status.success()
    });
    for direction in [&[][..], &["-R"]] {
        let options = [&["--json", "-t", "1"], direction].concat();
        let mut moved = 0;
        eventually("a report of iperf3's", || {
            let client = iperf3(&options).spawn().unwrap();
            for _ in 0..2 {
                sleep(Duration::from_millis(400));
                service.hand_over();
            }
            let output = client.wait_with_output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success(), "{text}");
            let report: serde_json::Value = serde_json::from_str(&text).unwrap();
            // The server closes a connection that comes while it tidies up after the one before, and the client succeeds.
            if report["start"]["connected"] == serde_json::json!([]) {
                println!("iperf3 was not served: {}", report["error"]);
                return false;
            }
            let bytes = report["end"]["sum_received"]["bytes"].as_u64();
            moved = bytes.unwrap_or_else(|| panic!("no sum: {text}"));
            true
        });
        assert!(moved > 0, "nothing has arrived");
        println!("iperf3 {direction:?} over two upgrades: {moved} bytes");
    }
}

/// Connections of either type that are there when the daemon dies, and the guest's view of their ends.
fn crash_under_load(guest: &Guest, service: &mut Service, opener: Opener, pause: Pause) -> Ends {
    let held = Held::open(guest, service);
    let port = new_port();
    let listener = listen_for_messages(&service.host_port_path(port));
    let held_messages = messages::spawn(guest, "hold", &format!("2:{port}"), "");
    let program = accept(&listener);
    assert_eq!(read_message(&program), b"held");
    let transfer = Transfer::start(guest, service, opener, 4096 * MIB, 65536);
    transfer.wait_for(MIB);
    pause(true);
    service.crash();
    pause(false);
    assert_closed(&program);
    Ends {
        transfer: transfer.expect_cut_at_both(),
        stream: held.how_it_ends(),
        messages: held_messages.wait_ok(),
    }
}

/// Pauses the machine, or lets it go on.
type Pause<'p> = &'p dyn Fn(bool);

#[derive(Debug)]
struct Ends {
    transfer: String,
    stream: String,
    messages: String,
}

#[test]
fn a_guest_loses_its_connections_alone_in_ten_crashes() {
    let mut service = start(Way::Manager);
    let guest = Uml::boot(&service);
    let mut chat = Chat::start(&guest, &service);
    for round in 0..10 {
        let opener = [Opener::Guest, Opener::Host][round % 2];
        let ends = crash_under_load(&guest, &mut service, opener, &|_| ());
        // What Linux tells a program that is sending depends on where in send(2) it is: ECONNRESET, EPIPE or ENOTCONN.
        assert!(ends.transfer.contains("Error"), "{ends:?}");
        // It tells others of TRANSPORT_RESET, for which UML gives the daemon the queue.
        assert_eq!(ends.stream, "ECONNRESET\n", "{ends:?}");
        assert_eq!(ends.messages, "ECONNRESET\ndone\n", "{ends:?}");
        // In the next round the guest connects.
        chat.start_again(&service);
        chat.answers();
    }
    service.hand_over();
    scenarios::works(&guest, &service);
}

fn a_machine_is_paused_and_reset(way: Way) {
    const TOTAL: usize = 32 * MIB;
    let mut service = start(way);
    let (kernel, memory) = match way {
        Way::Manager => (Kernel::V6_1, Memory::File),
        Way::Path => (Kernel::V6_12, Memory::Memfd),
    };
    let mut guest = Qemu::boot(&service, kernel, memory);
    let mut chat = Chat::start(&guest, &service);
    let messages = Messages::start(&guest, &service);
    let transfer = Transfer::start(&guest, &service, Opener::Guest, TOTAL, 65536);
    for upgrade in 1..=UPGRADES {
        transfer.wait_for(upgrade * TOTAL / (UPGRADES + 1));
        let is_paused = upgrade % 3 == 0;
        if is_paused {
            guest.stop();
        }
        service.hand_over();
        if is_paused {
            guest.cont();
        }
        chat.answers();
        messages.go_on();
    }
    transfer.finish();
    println!("{} messages", messages.finish());
    if way == Way::Manager {
        crash_with_a_machine(&guest, &mut service);
    }
    let held = Held::open(&guest, &service);
    guest.reset();
    held.expect_end();
    scenarios::works(&guest, &service);
}

/// The machine runs, and the next time it is paused.
fn crash_with_a_machine(guest: &Qemu, service: &mut Service) {
    let pause = |is_paused| {
        if is_paused {
            guest.stop();
        } else {
            guest.cont();
        }
    };
    let pauses: [Pause; 2] = [&|_| (), &pause];
    for pause in pauses {
        let ends = crash_under_load(guest, service, Opener::Guest, pause);
        println!("{ends:?}");
        scenarios::works(guest, service);
    }
}
