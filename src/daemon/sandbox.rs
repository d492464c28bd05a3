//! What the daemon gives up before it serves, so that whoever takes it over gains little.
//!
//! When the sandbox is entered, all sockets are bound. From then on the daemon only moves bytes between descriptors,
//! connects to host programs and siblings, starts a thread for each VMM, and removes its sockets when it stops. Everything else is
//! given up: capabilities, new privileges, core dumps, being traced by other processes of its user, the file system
//! (Landlock), and every system call that is not listed (seccomp).
//!
//! This file knows no other part of the daemon. The caller collects the system calls of all modules (their `syscalls`
//! functions) and hands them over; the list below has only what every Rust program with threads needs.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};

use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, PathFdError,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};
use libc::{c_int, c_long};
use log::warn;
use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::getpid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use thiserror::Error;

use crate::config::{ProcessConfig, Sandbox};
use crate::syscalls::{Argument, NOT_EXECUTABLE, Syscall};

/// The Landlock version that a complete sandbox takes, that of Linux 6.12.
const LANDLOCK: ABI = ABI::V6;

/// A later version, which also restricts connecting to Unix sockets. It is used where the kernel has it.
const LANDLOCK_UNIX_SOCKETS: ABI = ABI::V9;

/// A signal for glibc's own use (SIGSETXID), whose handler it installs when the first thread starts.
const SIGSETXID: c_int = 33;

/// What the Rust runtime and the C library need: memory, locks, threads, panics and exits.
const RUNTIME: &[Syscall] = &[
    // The heap and the stacks of threads.
    Syscall::any(libc::SYS_brk),
    Syscall::only(libc::SYS_mmap, NOT_EXECUTABLE),
    Syscall::only(libc::SYS_mprotect, NOT_EXECUTABLE),
    Syscall::any(libc::SYS_mremap),
    Syscall::any(libc::SYS_munmap),
    Syscall::any(libc::SYS_madvise),
    Syscall::any(libc::SYS_futex),
    Syscall::any(libc::SYS_getrandom),
    // A thread's start and end. The flags keep clone from making processes.
    Syscall::only(libc::SYS_clone, CLONE_THREAD),
    Syscall::any(libc::SYS_rseq),
    Syscall::any(libc::SYS_set_robust_list),
    Syscall::any(libc::SYS_sched_getaffinity),
    Syscall::any(libc::SYS_sigaltstack),
    Syscall::any(libc::SYS_rt_sigprocmask),
    Syscall::only(libc::SYS_rt_sigaction, &[Argument::Is(0, SIGSETXID)]),
    Syscall::only(libc::SYS_prctl, &[Argument::Is(0, libc::PR_SET_NAME)]),
    Syscall::only(libc::SYS_prctl, &[Argument::Is(0, libc::PR_SET_VMA)]),
    Syscall::any(libc::SYS_exit),
    // A panic's message, an abort, and the handlers of SIGSEGV and SIGBUS, which reset the signal and let it kill.
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_getcwd),
    Syscall::any(libc::SYS_getpid),
    Syscall::any(libc::SYS_gettid),
    Syscall::only(libc::SYS_tgkill, &[Argument::OwnPid(0)]),
    Syscall::only(libc::SYS_rt_sigaction, &[Argument::Is(0, libc::SIGABRT)]),
    Syscall::only(libc::SYS_rt_sigaction, &[Argument::Is(0, libc::SIGSEGV)]),
    Syscall::only(libc::SYS_rt_sigaction, &[Argument::Is(0, libc::SIGBUS)]),
    Syscall::any(libc::SYS_exit_group),
    // Debug builds check that a descriptor is open before they close it.
    #[cfg(debug_assertions)]
    Syscall::only(libc::SYS_fcntl, &[Argument::Is(1, libc::F_GETFD)]),
];

const CLONE_THREAD: &[Argument] = &[Argument::Bits {
    index: 0,
    mask: libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD,
    value: libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD,
}];

/// Calls that fail with EACCES instead of ending the daemon. Libraries open files now and then (how much memory there is,
/// the symbols of a backtrace) and go on without them.
const FILES: &[Syscall] = &[
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_open),
    Syscall::any(libc::SYS_openat),
    Syscall::any(libc::SYS_openat2),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_readlink),
    Syscall::any(libc::SYS_readlinkat),
];

/// Calls that fail with ENOSYS. clone3 has its flags in memory, where seccomp can't see them; the C library falls back to
/// clone.
const CLONE3: &[Syscall] = &[Syscall::any(libc::SYS_clone3)];

/// The system lacks a part of the sandbox, and `--sandbox=strict` asks for all of it.
#[derive(Debug, Error)]
#[error("--sandbox=strict: {missing}; --sandbox=auto starts without")]
pub struct SandboxError {
    missing: String,
}

/// A part of the sandbox that the system does not provide.
#[derive(Debug, Error)]
enum Missing {
    #[error("core dumps stay possible: {0}")]
    CoreLimit(nix::Error),
    #[error("other processes of the user can read its memory: {0}")]
    Dumpable(nix::Error),
    #[error("new privileges stay possible: {0}")]
    NewPrivileges(nix::Error),
    #[error("capabilities are kept: {0}")]
    Capabilities(caps::errors::CapsError),
    #[error("no Landlock in this kernel")]
    NoLandlock,
    #[error("Landlock is not enabled in this kernel")]
    LandlockDisabled,
    #[error("this kernel's Landlock is version {0:?} of {LANDLOCK:?}")]
    OldLandlock(ABI),
    #[error("no Landlock: {0}")]
    Landlock(#[from] RulesetError),
    #[error("no Landlock: {0}")]
    Directory(#[from] PathFdError),
    #[error("no seccomp: {0}")]
    Seccomp(#[from] seccompiler::Error),
    #[error("no seccomp: {0}")]
    Filter(#[from] seccompiler::BackendError),
}

/// Gives up everything that serving does not need, for the calling thread and those that it starts from now on. The sockets
/// of `config` must be bound by now. Files may also be removed in `directories`. Of the system calls, those of the runtime and those in `syscalls` remain; any other
/// ends the process.
///
/// With [`Sandbox::Auto`], what the system lacks is logged in one line. With [`Sandbox::Strict`], it is an error.
pub fn enter(
    config: &ProcessConfig,
    directories: &[PathBuf],
    syscalls: &[Syscall],
) -> Result<(), SandboxError> {
    if config.sandbox == Sandbox::Off {
        return Ok(());
    }
    // The order matters: Landlock may need a capability to open the directories, and seccomp forbids the calls of the
    // steps before it.
    let steps = [
        setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(Missing::CoreLimit),
        set_no_new_privs().map_err(Missing::NewPrivileges),
        restrict_files(config, directories),
        drop_capabilities().map_err(Missing::Capabilities),
        set_dumpable(false).map_err(Missing::Dumpable),
        restrict_syscalls(syscalls),
    ];
    let missing = steps.into_iter().filter_map(Result::err);
    let missing: Vec<String> = missing.map(|missing| missing.to_string()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.join("; ");
    if config.sandbox == Sandbox::Strict {
        return Err(SandboxError { missing });
    }
    warn!("the sandbox is incomplete: {missing}");
    Ok(())
}

/// Drops all capabilities. Even root is then an ordinary user, who owns root's files.
fn drop_capabilities() -> Result<(), caps::errors::CapsError> {
    // Dropping from the bounding set takes CAP_SETPCAP. Without it the set is harmless: there are no new privileges.
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    // This clears the effective set as well.
    caps::clear(None, CapSet::Permitted)
}

/// Denies access to the file system with Landlock, except for removing the sockets and, on kernels that restrict it,
/// connecting to host programs. TCP, abstract sockets and signals to other processes are denied as well.
fn restrict_files(config: &ProcessConfig, directories: &[PathBuf]) -> Result<(), Missing> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK_UNIX_SOCKETS))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    let mut allow = |directory: &Path, access: BitFlags<AccessFs>| -> Result<(), Missing> {
        (&mut ruleset).add_rule(PathBeneath::new(PathFd::new(directory)?, access))?;
        Ok(())
    };
    let own = config.directories();
    for directory in own.chain(directories.iter().map(|other| other.into())) {
        allow(&directory, AccessFs::RemoveFile.into())?;
    }
    for directory in config.peer_directories() {
        allow(directory, AccessFs::ResolveUnix.into())?;
    }
    let status = ruleset.restrict_self()?;
    match status.landlock {
        LandlockStatus::NotEnabled => Err(Missing::LandlockDisabled),
        LandlockStatus::NotImplemented => Err(Missing::NoLandlock),
        LandlockStatus::Available { effective_abi, .. } if effective_abi < LANDLOCK => {
            Err(Missing::OldLandlock(effective_abi))
        }
        LandlockStatus::Available { .. } => Ok(()),
    }
}

/// Installs the seccomp filters in all threads: a call that is not listed ends the process.
fn restrict_syscalls(syscalls: &[Syscall]) -> Result<(), Missing> {
    let refuse = |calls: &[Syscall], error: c_int| {
        let error = SeccompAction::Errno(error as u32);
        compile(calls, error, SeccompAction::Allow)
    };
    let listed = [RUNTIME, syscalls, FILES, CLONE3].concat();
    // Of several filters the strictest decides.
    let filters = [
        refuse(FILES, libc::EACCES)?,
        refuse(CLONE3, libc::ENOSYS)?,
        // Last, since it allows no seccomp call.
        compile(&listed, SeccompAction::Allow, SeccompAction::KillProcess)?,
    ];
    for filter in filters {
        seccompiler::apply_filter_all_threads(&filter)?;
    }
    Ok(())
}

/// A filter that answers each of `calls` with `listed` and all others with `other`.
fn compile(
    calls: &[Syscall],
    listed: SeccompAction,
    other: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = BTreeMap::new();
    for call in calls {
        let rules = rules.entry(call.number).or_default();
        if !call.arguments.is_empty() {
            let conditions = call.arguments.iter().map(condition);
            rules.push(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?);
        }
    }
    // A call that one module makes with any arguments has no conditions.
    for call in calls.iter().filter(|call| call.arguments.is_empty()) {
        rules.insert(call.number, Vec::new());
    }
    let arch = env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, other, listed, arch)?.try_into()
}

fn condition(argument: &Argument) -> Result<SeccompCondition, seccompiler::BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let (index, op, value) = match *argument {
        Argument::Is(index, value) => (index, Eq, value),
        Argument::Bits { index, mask, value } => (index, MaskedEq(mask as u32 as u64), value),
        Argument::OwnPid(index) => (index, Eq, getpid().as_raw()),
    };
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value as u32 as u64)
}
