//! The descriptors of the process, and their division among several VMs.
//!
//! A connection is a descriptor, and so is a client that has not said yet where it wants to go. The limit of open descriptors
//! (RLIMIT_NOFILE) is the process's, so a VM that has as many as it may would leave the others none. With several VMs, each
//! therefore has an equal share, and no more places than fit into it. One VM alone has whatever there is.

use log::warn;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{HostSide, VmConfig};

/// What the process has beside its VMs: the log, signals, the service manager, and the clients of its statistics.
const PROCESS: usize = 320;

/// What a VM has beside its connections, clients and listening sockets: the VMM's socket, the rings' eventfds.
const VM: usize = 48;

/// What a listening socket takes: itself, its duplicate for the worker, and its directory.
const LISTENER: usize = 3;

/// The part of a share, in sixteenths, that connections may have. Of the rest, clients without a connection have two, those
/// that wait for the guest two more, calls that siblings have not taken one, and the regions of the guest's memory three.
const FOR_CONNECTIONS: usize = 8;

/// The part that either kind of clients may have.
const FOR_CLIENTS: usize = 2;

/// Raises the limit as far as the system allows, and returns it.
pub(super) fn raise_limit() -> usize {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(hard)
    });
    let limit = raised.or_else(|error| {
        warn!("the limit of open descriptors stays as it is: {error}");
        getrlimit(Resource::RLIMIT_NOFILE).map(|(soft, _)| soft)
    });
    limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    })
}

/// Takes places from a VM that do not fit into its share of `limit`, where there are `vms` VMs.
pub(super) fn fit(config: &mut VmConfig, limit: usize, vms: usize) {
    if vms < 2 {
        return;
    }
    let share = limit.saturating_sub(PROCESS) / vms;
    let sixteenth = share.saturating_sub(VM + LISTENER * listeners(config)) / 16;
    // A VM with siblings has two thirds more than the number that is set (see `max_connections`).
    let connections = (sixteenth * FOR_CONNECTIONS * 3 / 5).max(1);
    config.max_clients = config.max_clients.min((sixteenth * FOR_CLIENTS).max(1));
    if connections < config.max_connections {
        warn!(
            "CID {}: {connections} connections instead of {}: its share of {limit} descriptors has no more, raise the limit \
             (LimitNOFILE, ulimit -n)",
            config.guest_cid, config.max_connections
        );
        config.max_connections = connections;
    }
}

/// How many sockets a VM listens on.
fn listeners(config: &VmConfig) -> usize {
    let types = config.packet_types().count();
    let host = match &config.host {
        HostSide::Unix { .. } => types,
        HostSide::Vsock { listen, .. } => listen.len(),
    };
    // One more is the VMM's.
    1 + host + config.guest_ports.len() + config.sibling_dirs.len() * types
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PortPath;
    use crate::packet::header::{Cid, PacketType};

    fn vm() -> VmConfig {
        VmConfig::new(Cid::try_from(4u32).unwrap(), "", "")
    }

    fn places(limit: usize, vms: usize) -> (usize, usize) {
        let mut config = vm();
        fit(&mut config, limit, vms);
        (config.max_connections, config.max_clients)
    }

    #[test]
    fn one_vm_has_all_places_whatever_the_limit() {
        let all = (VmConfig::DEFAULT_MAX_CONNECTIONS, VmConfig::MAX_CLIENTS);
        assert_eq!(places(3, 1), all);
        assert_eq!(places(524_288, 16), all);
    }

    #[test]
    fn what_all_vms_may_have_fits_into_the_limit() {
        for (limit, vms) in [(1024, 2), (1024, 3), (4096, 10), (20_000, 3), (20_000, 100)] {
            let (connections, clients) = places(limit, vms);
            let calls = clients.div_ceil(2);
            let places = connections + 2 * (connections / 3) + 2 * clients + calls;
            let vm = VM + LISTENER * listeners(&vm()) + places;
            assert!(PROCESS + vms * vm <= limit, "{limit} for {vms}: {vm}");
            assert!(connections > 1 && clients > 1, "{limit} for {vms}");
        }
        assert_eq!(places(3, 2), (1, 1));
    }

    #[test]
    fn listening_sockets_have_their_part() {
        let port = |port: u32| PortPath {
            port,
            packet_type: PacketType::Stream,
            path: format!("/{port}").into(),
        };
        let mut config = vm();
        config.sibling_dirs = vec!["/a".into(), "/b".into()];
        config.guest_ports = (1..=100).map(port).collect();
        assert_eq!(listeners(&config), 1 + 2 + 4 + 100);
        fit(&mut config, 2048, 2);
        assert!(config.max_connections < places(2048, 2).0);
    }
}
