//! What the daemon gives up before it serves, so that a guest, a VMM or a host program that took it over would have little.
//!
//! It has its sockets and descriptors by then. What it still needs of the system is to move bytes between descriptors, to
//! connect to `<uds-path>_<port>`, to start a thread for each VMM, and to remove its sockets in the end. All else goes:
//! capabilities, new privileges, core dumps and being traced by others of its user, the file system (Landlock), and every
//! system call that no file of this crate lists (seccomp).

use std::collections::BTreeMap;
use std::env;
use std::path::Path;

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

use crate::config::{ProcessConfig, Sandbox, folder};
use crate::daemon::{log_writer, relay, service};
use crate::host::listener;
use crate::metrics;
use crate::syscalls::{Argument, NOT_EXECUTABLE, Syscall};
use crate::vhost_user_vsock_thread::busy_poll as look;
use crate::vhu_vsock::vring;
use crate::{packet, thread_backend, txbuf, vhost_user_vsock_thread, vhu_vsock, vsock_conn};

/// The Landlock of Linux 6.12, which has all that the sandbox asks for but one.
const LANDLOCK: ABI = ABI::V6;

/// A later one, with a right for connecting to Unix sockets.
const LANDLOCK_OF_SOCKETS: ABI = ABI::V9;

/// The signal for the C library's own use, whose handler glibc installs with the first thread.
const SIGNAL_OF_THREADS: c_int = 33;

/// For the language and its libraries, whatever the daemon does: memory, locks, threads, and the end, be it a panic's.
const SYSCALLS: &[Syscall] = &[
    // The heap, and the stacks of threads.
    Syscall::any(libc::SYS_brk),
    Syscall::only(libc::SYS_mmap, NOT_EXECUTABLE),
    Syscall::only(libc::SYS_mprotect, NOT_EXECUTABLE),
    Syscall::any(libc::SYS_mremap),
    Syscall::any(libc::SYS_munmap),
    Syscall::any(libc::SYS_madvise),
    Syscall::any(libc::SYS_futex),
    Syscall::any(libc::SYS_getrandom),
    // A thread's start and end. The call for a process is the same, but has not these flags.
    Syscall::only(libc::SYS_clone, A_THREAD),
    Syscall::any(libc::SYS_rseq),
    Syscall::any(libc::SYS_set_robust_list),
    Syscall::any(libc::SYS_sched_getaffinity),
    Syscall::any(libc::SYS_sigaltstack),
    Syscall::any(libc::SYS_rt_sigprocmask),
    Syscall::only(
        libc::SYS_rt_sigaction,
        &[Argument::Is(0, SIGNAL_OF_THREADS)],
    ),
    Syscall::only(libc::SYS_prctl, &[Argument::Is(0, libc::PR_SET_NAME)]),
    Syscall::only(libc::SYS_prctl, &[Argument::Is(0, libc::PR_SET_VMA)]),
    Syscall::any(libc::SYS_exit),
    // A panic's message, an abort, and the end by a signal of memory, whose handler gives it back to the system.
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_getcwd),
    Syscall::any(libc::SYS_getpid),
    Syscall::any(libc::SYS_gettid),
    Syscall::only(libc::SYS_tgkill, &[Argument::Ourselves(0)]),
    Syscall::only(libc::SYS_rt_sigaction, &[Argument::Is(0, libc::SIGABRT)]),
    Syscall::only(libc::SYS_rt_sigaction, &[Argument::Is(0, libc::SIGSEGV)]),
    Syscall::only(libc::SYS_rt_sigaction, &[Argument::Is(0, libc::SIGBUS)]),
    Syscall::any(libc::SYS_exit_group),
];

const A_THREAD: &[Argument] = &[Argument::Bits {
    index: 0,
    mask: libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD,
    value: libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD,
}];

/// Files that the libraries would look at now and then, and do without: how much memory there is, where a panic was. No
/// file at all can be opened, not even without Landlock.
const FILES: &[Syscall] = &[
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_open),
    Syscall::any(libc::SYS_openat),
    Syscall::any(libc::SYS_openat2),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_readlink),
    Syscall::any(libc::SYS_readlinkat),
];

/// The kernel can't look into the arguments of this one. Where it is missing, threads are made by the older `clone`.
const UNREADABLE: &[Syscall] = &[Syscall::any(libc::SYS_clone3)];

/// Why the daemon does not serve.
#[derive(Debug, Error)]
#[error("--sandbox=strict: {missing}; --sandbox=auto does without")]
pub struct SandboxError {
    missing: String,
}

/// A part of the sandbox that the system doesn't give.
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
    Folder(#[from] PathFdError),
    #[error("no seccomp: {0}")]
    Seccomp(#[from] seccompiler::Error),
    #[error("no seccomp: {0}")]
    Filter(#[from] seccompiler::BackendError),
}

/// Gives up all that serving does not need, for the calling thread and those that it starts from now on. The sockets
/// of `config` are there already. Besides the calls that are listed below the caller, its own can be made.
pub fn enter(config: &ProcessConfig, callers: &[Syscall]) -> Result<(), SandboxError> {
    if config.sandbox == Sandbox::Off {
        return Ok(());
    }
    // The order matters: privileges may be needed to find the folders, and the last part forbids what the others do.
    let parts = [
        setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(Missing::CoreLimit),
        set_no_new_privs().map_err(Missing::NewPrivileges),
        leave_files(config),
        drop_capabilities().map_err(Missing::Capabilities),
        set_dumpable(false).map_err(Missing::Dumpable),
        leave_calls(callers),
    ];
    let missing = parts.into_iter().filter_map(Result::err);
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

/// Drops all capabilities. Even root is then an ordinary user, to whom root's files belong.
fn drop_capabilities() -> Result<(), caps::errors::CapsError> {
    // Only who may set capabilities may take them off the bounding set. Others can't gain by it: there are no new
    // privileges.
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    // And with them the effective ones.
    caps::clear(None, CapSet::Permitted)
}

/// Leaves the file system with Landlock, but for removing the sockets and, where Landlock knows of that, connecting to
/// host programs. TCP, abstract sockets and signals to others are left as well.
fn leave_files(config: &ProcessConfig) -> Result<(), Missing> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK_OF_SOCKETS))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    let mut allow = |folder: &Path, access: BitFlags<AccessFs>| -> Result<(), Missing> {
        (&mut ruleset).add_rule(PathBeneath::new(PathFd::new(folder)?, access))?;
        Ok(())
    };
    for folder in config.directories() {
        allow(folder, AccessFs::RemoveFile.into())?;
    }
    for vm in &config.vms {
        allow(folder(&vm.uds_path), AccessFs::ResolveUnix.into())?;
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

/// Makes every call that is not listed the last one, in all threads.
fn leave_calls(callers: &[Syscall]) -> Result<(), Missing> {
    let metrics = metrics::syscalls();
    let allowed = [
        SYSCALLS,
        callers,
        listener::SYSCALLS,
        vhu_vsock::SYSCALLS,
        vring::SYSCALLS,
        vhost_user_vsock_thread::SYSCALLS,
        look::SYSCALLS,
        log_writer::SYSCALLS,
        relay::SYSCALLS,
        service::SYSCALLS,
        &metrics,
        thread_backend::SYSCALLS,
        vsock_conn::SYSCALLS,
        txbuf::SYSCALLS,
        packet::SYSCALLS,
    ];
    let refuse = |calls: &[Syscall], error: c_int| {
        let error = SeccompAction::Errno(error as u32);
        compile(&[calls], error, SeccompAction::Allow)
    };
    let known = [&allowed[..], &[FILES, UNREADABLE]].concat();
    // The strictest of them decides.
    let filters = [
        refuse(FILES, libc::EACCES)?,
        refuse(UNREADABLE, libc::ENOSYS)?,
        // The last one: it allows no other.
        compile(&known, SeccompAction::Allow, SeccompAction::KillProcess)?,
    ];
    for filter in filters {
        seccompiler::apply_filter_all_threads(&filter)?;
    }
    Ok(())
}

/// A filter that answers each of `calls` with `listed` and all others with `other`.
fn compile(
    calls: &[&[Syscall]],
    listed: SeccompAction,
    other: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = BTreeMap::new();
    let calls = || calls.iter().copied().flatten();
    for call in calls() {
        let rules = rules.entry(call.number).or_default();
        if !call.arguments.is_empty() {
            let conditions = call.arguments.iter().map(condition);
            rules.push(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?);
        }
    }
    // One that is free somewhere is free.
    for call in calls().filter(|call| call.arguments.is_empty()) {
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
        Argument::Ourselves(index) => (index, Eq, getpid().as_raw()),
    };
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value as u32 as u64)
}
