//! The sandbox, seen from outside: by a tracer that makes the daemon try, and by its state in /proc.

mod common;

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::thread;

use caps::{CapSet, Capability};
use common::daemon::{Daemon, GUEST_CID, binary, eventually};
use common::sim::host::assert_serves;
use common::sim::vhost_user::Frontend;
use common::sim::{Setup, SimGuest};
use common::tracer::{Outcome, Traced};
use nix::errno::Errno;
use nix::libc::{self, c_long};
use nix::sys::signal::Signal;
use nix::unistd::{geteuid, getgid, getgroups, getpid};
use seccompiler::{SeccompAction, SeccompFilter};
use tempfile::TempDir;

const OFF: &[&str] = &["--sandbox=off"];

/// The directory that paths start from.
const HERE: u64 = libc::AT_FDCWD as u64;

/// A daemon that has entered its sandbox, which it does shortly after it has created its sockets.
fn serving(options: &[&str]) -> Daemon {
    let daemon = Daemon::start_with(options);
    eventually("the daemon to serve", || {
        daemon.log().contains("waiting for a VMM")
    });
    daemon
}

/// System calls that the daemon never makes, none of which does harm where it is allowed: many are listed with other
/// arguments.
fn forbidden(path: u64) -> Vec<(&'static str, c_long, Vec<u64>)> {
    let (exec, none) = (libc::PROT_EXEC as u64, u64::MAX);
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let test = getpid().as_raw() as u64;
    vec![
        ("execve", libc::SYS_execve, vec![path, 0, 0]),
        ("ptrace", libc::SYS_ptrace, vec![none]),
        (
            "a process",
            libc::SYS_clone,
            vec![(libc::CLONE_NEWUSER | libc::CLONE_FS) as u64],
        ),
        (
            "another process's memory",
            libc::SYS_process_vm_readv,
            vec![test, 0, 0, 0, 0, 0],
        ),
        ("a signal", libc::SYS_kill, vec![test, 0]),
        (
            "a signal to a thread",
            libc::SYS_tgkill,
            vec![test, test, 0],
        ),
        (
            "TCP",
            libc::SYS_socket,
            vec![libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0],
        ),
        (
            "datagrams",
            libc::SYS_socket,
            vec![libc::AF_UNIX as u64, libc::SOCK_DGRAM as u64, 0],
        ),
        ("another listener", libc::SYS_listen, vec![none, 0]),
        (
            "code",
            libc::SYS_mmap,
            vec![0, 4096, exec, anonymous, none, 0],
        ),
        ("memory as code", libc::SYS_mprotect, vec![0, 0, exec]),
        (
            "keys for a terminal",
            libc::SYS_ioctl,
            vec![0, libc::TIOCSTI, 0],
        ),
        (
            "a signal for input",
            libc::SYS_fcntl,
            vec![0, libc::F_GETOWN as u64, 0],
        ),
        (
            "being dumpable",
            libc::SYS_prctl,
            vec![libc::PR_GET_DUMPABLE as u64, 0, 0, 0, 0],
        ),
        (
            "a handler",
            libc::SYS_rt_sigaction,
            vec![libc::SIGUSR1 as u64, 0, 0, 8],
        ),
        (
            "a directory",
            libc::SYS_unlinkat,
            vec![HERE, path, libc::AT_REMOVEDIR as u64],
        ),
        (
            "a name for a file",
            libc::SYS_linkat,
            vec![HERE, path, HERE, path, 0],
        ),
        ("mount", libc::SYS_mount, vec![0, path, 0, 0, 0]),
        ("a namespace", libc::SYS_unshare, vec![0]),
        ("a user", libc::SYS_setresuid, vec![none, none, none]),
        ("io_uring", libc::SYS_io_uring_setup, vec![0, 0]),
        ("bpf", libc::SYS_bpf, vec![none, 0, 0]),
        ("no call at all", 4095, vec![]),
    ]
}

#[test]
fn a_call_that_is_not_listed_is_the_last() {
    let nowhere = Path::new("/nowhere/at/all");
    let mut free = Traced::serving(OFF, nowhere);
    let calls = forbidden(free.path());
    for (index, (name, number, arguments)) in calls.into_iter().enumerate() {
        let outcome = free.call(number, &arguments);
        assert!(
            matches!(outcome, Outcome::Returned(_)),
            "{name}: {outcome:?}"
        );

        let mut daemon = Traced::serving(&[], nowhere);
        // The path is at a different address in each.
        let (.., arguments) = forbidden(daemon.path()).swap_remove(index);
        let outcome = daemon.call(number, &arguments);
        assert_eq!(outcome, Outcome::Killed(Signal::SIGSYS), "{name}");
    }
}

#[test]
fn no_file_can_be_opened_wherever_it_is() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "secret").unwrap();
    for file in [&file, Path::new("/etc/passwd"), Path::new("/")] {
        let open = |mut daemon: Traced| {
            let arguments = [HERE, daemon.path(), libc::O_RDONLY as u64, 0];
            daemon.call(libc::SYS_openat, &arguments)
        };
        let refused = open(Traced::serving(&[], file));
        assert_eq!(refused, Outcome::error(Errno::EACCES), "{file:?}");
        let opened = open(Traced::serving(OFF, file));
        assert!(matches!(opened, Outcome::Returned(0..)), "{opened:?}");
    }
}

#[test]
fn a_refused_call_leaves_the_daemon_serving() {
    let mut daemon = Traced::serving(&[], Path::new("/etc/passwd"));
    let open = [HERE, daemon.path(), libc::O_RDONLY as u64, 0];
    let refused = daemon.call(libc::SYS_openat, &open);
    assert_eq!(refused, Outcome::error(Errno::EACCES));
    // The C library then uses the older call.
    let refused = daemon.call(libc::SYS_clone3, &[0, 0]);
    assert_eq!(refused, Outcome::error(Errno::ENOSYS));
    let listed = daemon.call(libc::SYS_getpid, &[]);
    assert_eq!(listed, Outcome::Returned(daemon.pid().as_raw().into()));
    daemon.release();
    let vmm = Frontend::connect(&daemon.vhost_socket());
    assert_ne!(vmm.features(), 0);
}

/// Landlock alone: seccomp can't inspect paths.
#[test]
fn a_file_outside_the_directories_can_not_be_removed() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let remove = |mut daemon: Traced| {
        let arguments = [HERE, daemon.path(), 0];
        daemon.call(libc::SYS_unlinkat, &arguments)
    };
    let refused = remove(Traced::serving(&[], &file));
    assert_eq!(refused, Outcome::error(Errno::EACCES));
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    let removed = remove(Traced::serving(OFF, &file));
    assert_eq!(removed, Outcome::Returned(0));
    assert!(!file.exists());
}

/// Landlock alone again: the daemon binds names for its calls, and none of them is a file.
#[test]
fn no_socket_can_be_bound_to_a_file() {
    let bind = |options: &[&str]| {
        let directory = TempDir::new().unwrap();
        let file = directory.path().join("socket");
        // With the address family in front, which has a NUL, the path is an address.
        let address = format!("{}.{}", char::from(libc::AF_UNIX as u8), file.display());
        let mut daemon = Traced::serving(options, Path::new(&address));
        daemon.set_byte(daemon.path() + 1, 0);
        let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let socket = daemon.call(libc::SYS_socket, &[libc::AF_UNIX as u64, kind as u64, 0]);
        let Outcome::Returned(socket) = socket else {
            panic!("no socket: {socket:?}")
        };
        let arguments = [socket as u64, daemon.path(), address.len() as u64];
        (daemon.call(libc::SYS_bind, &arguments), file.exists())
    };
    assert_eq!(bind(&[]), (Outcome::error(Errno::EACCES), false));
    assert_eq!(bind(OFF), (Outcome::Returned(0), true));
}

/// The state of each thread in /proc: privileges, capabilities, filter.
fn confinement(daemon: &Daemon) -> Vec<Vec<String>> {
    let wanted = [
        "NoNewPrivs:",
        "Seccomp:",
        "CapInh:",
        "CapPrm:",
        "CapEff:",
        "CapAmb:",
    ];
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let status = |task: io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let lines = status.lines().filter(|line| {
            // Only a process with CAP_SETPCAP can drop them from this set.
            let bounding = line.starts_with("CapBnd:") && geteuid().is_root();
            bounding || wanted.iter().any(|wanted| line.starts_with(wanted))
        });
        lines.map(|line| line.replace('\t', " ")).collect()
    };
    tasks.map(status).collect()
}

#[test]
fn no_thread_has_a_privilege() {
    let daemon = serving(&[]);
    let assert_confined = |threads: usize| {
        let confinement = confinement(&daemon);
        assert_eq!(confinement.len(), threads);
        for lines in confinement {
            let none = "0000000000000000";
            let (caps, others): (Vec<String>, Vec<String>) =
                lines.into_iter().partition(|line| line.starts_with("Cap"));
            assert!(caps.iter().all(|line| line.ends_with(none)), "{caps:?}");
            assert_eq!(caps.len(), if geteuid().is_root() { 5 } else { 4 });
            assert_eq!(others, ["NoNewPrivs: 1", "Seccomp: 2"]);
        }
    };
    // The first, the log's, the worker, and the one for the VMM's messages.
    eventually("its threads", || daemon.threads() == 4);
    assert_confined(4);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    assert_serves(&daemon, &mut guest);
    // And the watchdog of the VMM's descriptors.
    assert_confined(5);

    let free = serving(OFF);
    let confinement = confinement(&free);
    let is_free = |lines: &Vec<String>| lines.iter().any(|line| line == "Seccomp: 0");
    assert!(confinement.iter().all(is_free), "{confinement:?}");
}

#[test]
fn it_leaves_no_core() {
    let core = |daemon: &Daemon| {
        let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max core"));
        let words: Vec<String> = line.unwrap().split_whitespace().map(Into::into).collect();
        words[4..6].to_vec()
    };
    assert_eq!(core(&serving(&[])), ["0", "0"]);
    let ours = Command::new("/bin/sh").args(["-c", "ulimit -Sc"]).output();
    let ours = String::from_utf8(ours.unwrap().stdout).unwrap();
    if ours.trim() != "0" {
        assert_ne!(core(&serving(OFF))[0], "0");
    }
}

/// Runs `work` in a thread that may trace other processes of its user, and no more.
fn as_any_tracer<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let tracer = || {
        if geteuid().is_root() {
            for set in [CapSet::Bounding, CapSet::Effective, CapSet::Permitted] {
                caps::drop(None, set, Capability::CAP_SYS_PTRACE).unwrap();
            }
        }
        work()
    };
    thread::scope(|scope| scope.spawn(tracer).join().unwrap())
}

#[test]
fn its_memory_is_not_dumpable() {
    // Who may trace a process may see which program it is.
    let program = |options: &[&str]| {
        as_any_tracer(|| {
            let daemon = serving(options);
            fs::read_link(format!("/proc/{}/exe", daemon.pid()))
        })
    };
    assert_eq!(program(OFF).unwrap(), binary().canonicalize().unwrap());
    let refused = program(&[]).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
}

/// Runs `work` in a thread for which, and for whose children, these system calls don't exist.
fn without<T: Send>(calls: &[c_long], work: impl FnOnce() -> T + Send) -> T {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, missing, arch);
    let filter: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    let bereft = || {
        seccompiler::apply_filter(&filter).unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(bereft).join().unwrap())
}

/// Older kernels, and the message about each.
const BEREFT: [(&[c_long], &[&str]); 3] = [
    (&[libc::SYS_landlock_create_ruleset], &["no Landlock"]),
    (&[libc::SYS_seccomp], &["no seccomp"]),
    (
        &[libc::SYS_landlock_create_ruleset, libc::SYS_seccomp],
        &["no Landlock", "no seccomp"],
    ),
];

#[test]
fn the_strict_sandbox_is_whole_or_there_is_no_daemon() {
    for (calls, messages) in BEREFT {
        let directory = TempDir::new().unwrap();
        let output = without(calls, || {
            Command::new(binary())
                .arg(format!("--guest-cid={GUEST_CID}"))
                .arg("--socket")
                .arg(directory.path().join("vhost"))
                .arg("--uds-path")
                .arg(directory.path().join("uds"))
                .arg("--sandbox=strict")
                .output()
                .unwrap()
        });
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains("--sandbox=strict: "), "{stderr}");
        assert!(
            messages.iter().all(|message| stderr.contains(message)),
            "{stderr}"
        );
        assert_eq!(
            fs::read_dir(&directory).unwrap().count(),
            0,
            "no socket is left"
        );
    }
}

#[test]
fn the_usual_sandbox_does_without_and_says_so_once() {
    for (calls, messages) in BEREFT {
        let daemon = without(calls, || serving(&[]));
        let log = daemon.log();
        let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
        assert_eq!(warnings.len(), 1, "{log}");
        assert!(
            messages.iter().all(|message| warnings[0].contains(message)),
            "{log}"
        );
        let mut guest = SimGuest::start(&daemon, Setup::default());
        assert_serves(&daemon, &mut guest);
    }
}

#[test]
fn the_other_half_holds_where_one_is_missing() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let opened = without(&[libc::SYS_landlock_create_ruleset], || {
        let mut daemon = Traced::serving(&[], &file);
        let arguments = [HERE, daemon.path(), libc::O_RDONLY as u64, 0];
        daemon.call(libc::SYS_openat, &arguments)
    });
    assert_eq!(opened, Outcome::error(Errno::EACCES), "without Landlock");
    let opened = without(&[libc::SYS_seccomp], || {
        let mut daemon = Traced::serving(&[], &file);
        let arguments = [HERE, daemon.path(), libc::O_RDONLY as u64, 0];
        daemon.call(libc::SYS_openat, &arguments)
    });
    assert_eq!(opened, Outcome::error(Errno::EACCES), "without seccomp");
}

/// The permissions and the group of a file.
fn access(path: &Path) -> (u32, u32) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.permissions().mode() & 0o7777, metadata.gid())
}

#[test]
fn both_sockets_have_the_mode_and_the_group_that_was_asked_for() {
    // Any group is root's to give. Others give the ones they are in.
    let group = if geteuid().is_root() {
        54_321
    } else {
        let groups = getgroups().unwrap();
        groups.first().copied().unwrap_or(getgid()).as_raw()
    };
    let own = access(&TempDir::new().unwrap().path().join(".")).1;
    let (mode, chosen) = ("--socket-mode=0606", format!("--socket-group={group}"));
    for (options, wanted) in [
        (&[][..], (0o600, own)),
        (&[mode], (0o606, own)),
        (&[&chosen], (0o660, group)),
        (&[mode, &chosen], (0o606, group)),
        (&[mode, &chosen, OFF[0]], (0o606, group)),
    ] {
        let daemon = serving(options);
        assert_eq!(access(&daemon.vhost_socket()), wanted, "{options:?}");
        assert_eq!(access(&daemon.uds_path()), wanted, "{options:?}");
        let mut guest = SimGuest::start(&daemon, Setup::default());
        assert_serves(&daemon, &mut guest);
    }
}

#[test]
fn nobody_else_connects_before_a_socket_has_its_mode() {
    let mut daemon = Traced::start(&["--socket-mode=0666"], Path::new("/"));
    daemon.run_to(libc::SYS_bind);
    assert_eq!(access(&daemon.vhost_socket()).0, 0o600);
    daemon.run_to(libc::SYS_bind);
    assert_eq!(access(&daemon.vhost_socket()).0, 0o666);
    assert_eq!(access(&daemon.uds_path()).0, 0o600);
}
