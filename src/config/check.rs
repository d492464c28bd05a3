//! What can be wrong with a configuration, apart from the text that it was read from.

use std::borrow::Cow;
use std::collections::HashSet;
use std::os::fd::RawFd;
use std::path::Path;
use std::time::Duration;

use super::paths::{self, PathKind, SocketPath};
use super::{
    ConfigError, HostSide, PortPath, ProcessConfig, Socket, VmConfig, VsockPort, directory_of,
};
use crate::packet::header::{Cid, PacketType};

/// The largest buffer of a connection, in bytes.
pub(super) const MAX_TX_BUFFER: u32 = 1 << 30;

/// The largest ring, in entries (virtio 1.2, 2.7).
pub(super) const MAX_QUEUE_SIZE: u16 = 32768;

/// The longest busy poll.
pub(super) const MAX_BUSY_POLL: Duration = Duration::from_millis(10);

/// The longest wait of a host program for the guest.
pub(super) const MAX_WAIT_FOR_GUEST: Duration = Duration::from_secs(24 * 60 * 60);

/// VMADDR_PORT_ANY, which is no port.
pub(super) const PORT_ANY: u32 = u32::MAX;

/// A mistake, and where it was made.
#[derive(Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The index of the VM, or `None` if it is the process's.
    pub vm: Option<usize>,
    /// The name of the option, without dashes.
    pub option: &'static str,
    /// The mistake.
    pub error: ConfigError,
}

impl ProcessConfig {
    /// Checks each VM alone and against the others. The directories of the sockets must exist.
    ///
    /// # Errors
    /// The first mistake that is found.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.find_mistake().map_err(|mistake| mistake.error)
    }

    /// As [`check`](Self::check), with the place of the mistake.
    ///
    /// # Errors
    /// The first mistake that is found.
    pub fn find_mistake(&self) -> Result<(), Mistake> {
        if self.vms.is_empty() {
            return Err(Mistake {
                vm: None,
                option: "vm",
                error: ConfigError::NoVm,
            });
        }
        for (index, vm) in self.vms.iter().enumerate() {
            let checked = vm.check().and_then(|()| vm.check_beside(&self.vms, index));
            checked.map_err(|(option, error)| Mistake {
                vm: Some(index),
                option,
                error,
            })?;
        }
        let paths: Vec<SocketPath<'_>> = self.paths().collect();
        paths::check(&paths).map_err(|(path, error)| Mistake {
            vm: path.vm,
            option: path.option.trim_start_matches("--"),
            error: error.into(),
        })
    }

    /// The directories in which the process makes and removes sockets.
    pub fn directories(&self) -> impl Iterator<Item = Cow<'_, Path>> {
        let bound = self.paths().filter(|path| path.kind.is_bound());
        bound.map(|socket| directory(socket.path))
    }

    /// The directories in which the process connects to sockets of others.
    pub fn peer_directories(&self) -> impl Iterator<Item = &Path> {
        self.vms.iter().flat_map(|vm| {
            let host = vm.host.uds_path().into_iter();
            let host_ports = vm.host_ports.iter().map(|host| &*host.path);
            let siblings = vm.sibling_dirs.iter().map(|directory| &**directory);
            host.chain(host_ports).map(directory_of).chain(siblings)
        })
    }

    fn paths(&self) -> impl Iterator<Item = SocketPath<'_>> {
        let of_process = [
            ("--stats-path", &self.stats_path),
            ("--handover-path", &self.handover_path),
        ];
        let of_process = of_process.into_iter().filter_map(|(option, path)| {
            Some(SocketPath {
                vm: None,
                option,
                path: path.as_deref()?.into(),
                kind: PathKind::Bound,
            })
        });
        let vms = self.vms.iter().enumerate();
        vms.flat_map(|(index, vm)| vm.paths(index))
            .chain(of_process)
    }
}

fn directory(path: Cow<'_, Path>) -> Cow<'_, Path> {
    match path {
        Cow::Borrowed(path) => directory_of(path).into(),
        Cow::Owned(path) => directory_of(&path).to_owned().into(),
    }
}

/// The option that is wrong, and its mistake.
type Checked = Result<(), (&'static str, ConfigError)>;

impl VmConfig {
    /// Checks all but the paths.
    fn check(&self) -> Checked {
        // A `Cid` may also be the host's, or one that a packet carried.
        Cid::try_from(self.guest_cid.get()).map_err(|error| ("guest-cid", error.into()))?;
        if !(1..=MAX_TX_BUFFER).contains(&self.tx_buffer_size) {
            let error = ConfigError::TxBufferSize(self.tx_buffer_size);
            return Err(("tx-buffer-size", error));
        }
        if !(2..=MAX_QUEUE_SIZE).contains(&self.queue_size) || !self.queue_size.is_power_of_two() {
            return Err(("queue-size", ConfigError::QueueSize(self.queue_size.into())));
        }
        if self.max_connections == 0 {
            return Err(("max-connections", ConfigError::MaxConnections));
        }
        if self.busy_poll > MAX_BUSY_POLL {
            let error = ConfigError::BusyPoll(self.busy_poll.as_micros());
            return Err(("busy-poll", error));
        }
        if self.wait_for_guest > MAX_WAIT_FOR_GUEST {
            let error = ConfigError::WaitForGuest(self.wait_for_guest.as_secs());
            return Err(("wait-for-guest", error));
        }
        for packet_type in [PacketType::Stream, PacketType::Seqpacket] {
            let is_of_type = |named: &&PortPath| named.packet_type == packet_type;
            let ports = |named| {
                <[PortPath]>::iter(named)
                    .filter(is_of_type)
                    .map(|named| named.port)
            };
            check_ports("guest-port", ports(&self.guest_ports))?;
            check_ports("host-port", ports(&self.host_ports))?;
        }
        let named = self.guest_ports.iter().chain(&self.host_ports);
        let mut types = named
            .map(|named| named.packet_type)
            .chain(self.forwarded_types());
        if !self.seqpacket && types.any(|packet_type| packet_type == PacketType::Seqpacket) {
            return Err(("seqpacket", ConfigError::SeqpacketOff));
        }
        if let HostSide::Vsock { cid, listen } = &self.host {
            if !(1..u64::from(u32::MAX)).contains(&cid.get()) {
                return Err(("forward-cid", ConfigError::ForwardCid(*cid)));
            }
            for packet_type in [PacketType::Stream, PacketType::Seqpacket] {
                let ports = listen.iter().filter(|at| at.packet_type == packet_type);
                check_ports("forward-listen", ports.map(|at| at.port))?;
            }
        }
        Ok(())
    }

    /// Checks what may be in the way of the other VMs, of which this has the number `index`.
    fn check_beside(&self, vms: &[Self], index: usize) -> Checked {
        let before = &vms[..index];
        let cid = self.guest_cid;
        if before.iter().any(|other| other.guest_cid == cid) {
            return Err(("guest-cid", ConfigError::DuplicateCid(cid)));
        }
        let taken: HashSet<RawFd> = before.iter().flat_map(Self::inherited).collect();
        let mut own = HashSet::new();
        let mut inherited = self.inherited();
        if let Some(fd) = inherited.find(|fd| taken.contains(fd) || !own.insert(*fd)) {
            return Err(("fd", ConfigError::DuplicateFd(fd)));
        }
        let HostSide::Vsock { cid, listen } = &self.host else {
            return Ok(());
        };
        if vms.iter().any(|other| other.guest_cid == *cid) {
            return Err(("forward-cid", ConfigError::ForwardToGuest(*cid)));
        }
        let taken: HashSet<VsockPort> = before.iter().flat_map(forwarded).copied().collect();
        let option = "forward-listen";
        match listen.iter().find(|at| taken.contains(at)) {
            Some(&VsockPort { port, .. }) => {
                Err((option, ConfigError::DuplicatePort { option, port }))
            }
            None => Ok(()),
        }
    }

    /// The descriptors of its inherited sockets.
    fn inherited(&self) -> impl Iterator<Item = RawFd> {
        let socket = match self.socket {
            Socket::Inherited(fd) => Some(fd),
            Socket::Path(_) => None,
        };
        let uds = match self.host {
            HostSide::Unix { fd, .. } => fd,
            HostSide::Vsock { .. } => None,
        };
        socket.into_iter().chain(uds)
    }

    fn forwarded_types(&self) -> impl Iterator<Item = PacketType> {
        forwarded(self).iter().map(|at| at.packet_type)
    }

    fn paths(&self, index: usize) -> impl Iterator<Item = SocketPath<'_>> {
        let new = move |option, path, kind| SocketPath {
            vm: Some(index),
            option,
            path,
            kind,
        };
        let socket = match &self.socket {
            Socket::Path(path) => Some(new("--socket", path.into(), PathKind::Bound)),
            Socket::Inherited(_) => None,
        };
        let uds = self.host.uds_path();
        let uds = uds.map(move |path| new("--uds-path", path.into(), PathKind::UdsPath));
        let seqpacket = self.seqpacket_path();
        let seqpacket = seqpacket.map(move |path| new("--uds-path", path.into(), PathKind::Bound));
        let guest_ports = self.guest_ports.iter();
        let guest_ports = guest_ports
            .map(move |guest| new("--guest-port", (&*guest.path).into(), PathKind::Bound));
        let host_ports = self.host_ports.iter();
        let host_ports = host_ports
            .map(move |host| new("--host-port", (&*host.path).into(), PathKind::HostProgram));
        let siblings = self.sibling_dirs.iter().flat_map(move |directory| {
            self.packet_types().map(move |packet_type| {
                let path = paths::sibling_path(directory, self.guest_cid, packet_type);
                new("--sibling-dir", path.into(), PathKind::Sibling)
            })
        });
        let bound = uds
            .into_iter()
            .chain(seqpacket)
            .chain(socket)
            .chain(guest_ports);
        bound.chain(siblings).chain(host_ports)
    }
}

fn forwarded(vm: &VmConfig) -> &[VsockPort] {
    match &vm.host {
        HostSide::Vsock { listen, .. } => listen,
        HostSide::Unix { .. } => &[],
    }
}

/// Checks ports of one VM that must be different.
fn check_ports(option: &'static str, ports: impl Iterator<Item = u32>) -> Checked {
    let mut seen = HashSet::new();
    for port in ports {
        if port == PORT_ANY {
            return Err((option, ConfigError::Port { option, port }));
        }
        if !seen.insert(port) {
            return Err((option, ConfigError::DuplicatePort { option, port }));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sandbox;

    fn vm(cid: u32) -> VmConfig {
        let path = |name| format!("/tmp/{name}{cid}");
        VmConfig::new(Cid::try_from(cid).unwrap(), path("vhost"), path("uds"))
    }

    fn check(vms: impl Into<Vec<VmConfig>>) -> Result<(), String> {
        let checked = ProcessConfig::new(vms.into()).check();
        checked.map_err(|error| error.to_string())
    }

    #[track_caller]
    fn assert_refused(vms: impl Into<Vec<VmConfig>>, message: &str) {
        let error = check(vms).unwrap_err();
        assert!(error.contains(message), "{error} should say {message}");
    }

    fn changed(change: impl FnOnce(&mut VmConfig)) -> [VmConfig; 1] {
        let mut vm = vm(4);
        change(&mut vm);
        [vm]
    }

    #[test]
    fn the_defaults_are_right() {
        assert_eq!(check([vm(4)]), Ok(()));
        assert_eq!(check([vm(4), vm(5), vm(6)]), Ok(()));
    }

    #[test]
    fn a_process_without_a_vm_is_refused() {
        assert_refused([], "no VM is given");
    }

    #[test]
    fn cids_that_are_no_guests_are_refused() {
        let message = "--guest-cid=2: ";
        assert_refused(changed(|vm| vm.guest_cid = Cid::HOST), message);
        let raw = Cid::from_raw(1 << 32);
        assert_refused(changed(|vm| vm.guest_cid = raw), "3 to 4294967294");
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert_refused(changed(|vm| vm.tx_buffer_size = 0), "--tx-buffer-size=0");
        assert_refused(changed(|vm| vm.tx_buffer_size = MAX_TX_BUFFER + 1), "bytes");
        assert_refused(changed(|vm| vm.queue_size = 100), "power of two");
        assert_refused(changed(|vm| vm.queue_size = 1), "power of two");
        assert_refused(changed(|vm| vm.max_connections = 0), "at least one");
        let second = Duration::from_secs(1);
        assert_refused(changed(|vm| vm.busy_poll = second), "10000 microseconds");
    }

    #[test]
    fn each_vm_is_checked() {
        let mut vms = [vm(4), vm(5)];
        vms[1].queue_size = 3;
        assert_refused(vms, "--queue-size=3");
    }

    #[test]
    fn two_vms_need_two_cids() {
        let mut vms = [vm(4), vm(5)];
        vms[1].guest_cid = vms[0].guest_cid;
        assert_refused(vms, "--guest-cid=4: another VM has this CID");
    }

    #[test]
    fn two_vms_share_no_path() {
        let mut vms = [vm(4), vm(5)];
        vms[1].host = HostSide::unix("/tmp/vhost4");
        assert_refused(vms, "--uds-path /tmp/vhost4: ");
        let mut vms = [vm(4), vm(5)];
        vms[1].socket = Socket::Path("/tmp/./vhost4".into());
        assert_refused(vms, "--socket /tmp/./vhost4: ");
    }

    #[test]
    fn a_guest_reaches_no_socket_of_another_vm_as_a_port() {
        let mut vms = [vm(4), vm(5)];
        vms[0].host = HostSide::unix("/tmp/vm");
        vms[1].host = HostSide::unix("/tmp/vm_4");
        let message = "--uds-path /tmp/vm_4: a guest's connections to a port of --uds-path /tmp/vm";
        assert_refused(vms.clone(), message);
        vms.reverse();
        assert_refused(vms, message);
    }

    #[test]
    fn the_statistics_socket_has_a_path_of_its_own() {
        for (path, message) in [("/tmp/./uds4", "its own"), ("/tmp/uds4_80", "to a port")] {
            let config = ProcessConfig {
                stats_path: Some(path.into()),
                ..ProcessConfig::new(vec![vm(4)])
            };
            let error = config.check().unwrap_err().to_string();
            assert!(error.starts_with("--stats-path"), "{error}");
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn a_successor_has_a_socket_of_its_own() {
        for path in ["/tmp/./uds4", "/tmp/uds4_80", "/tmp/stats"] {
            let config = ProcessConfig {
                stats_path: Some("/tmp/stats".into()),
                handover_path: Some(path.into()),
                ..ProcessConfig::new(vec![vm(4)])
            };
            let error = config.check().unwrap_err().to_string();
            assert!(error.starts_with("--handover-path"), "{error}");
        }
        let config = ProcessConfig {
            handover_path: Some("/dev/handover".into()),
            ..ProcessConfig::new(vec![vm(4)])
        };
        assert_eq!(config.check(), Ok(()));
        let directories: Vec<_> = config.directories().collect();
        assert!(directories.contains(&Path::new("/dev").into()));
    }

    #[test]
    fn an_inherited_socket_has_no_path() {
        assert_eq!(
            check(changed(|vm| vm.socket = Socket::Inherited(3))),
            Ok(())
        );
    }

    #[test]
    fn every_sandbox_has_a_name() {
        let read = Sandbox::NAMES.map(|name| name.parse::<Sandbox>().unwrap());
        assert_eq!(read, [Sandbox::Auto, Sandbox::Strict, Sandbox::Off]);
        assert_eq!(read.map(|sandbox| sandbox.to_string()), Sandbox::NAMES);
        assert_eq!("on".parse::<Sandbox>(), Err(ConfigError::Sandbox));
    }
}
