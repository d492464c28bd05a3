//! Sockets that a service manager passes to the daemon (sd_listen_fds(3)), and what it has stored for it.

use std::os::fd::RawFd;

use crate::config::ConfigError;
use crate::config::options::InheritedSockets;
use crate::daemon::handover;

/// The name of the socket for the VMM. With several VMs, `-<CID>` is behind it.
const VMM: &str = "vhost-user";

/// The name of the socket for host programs.
const HOST: &str = "host";

/// The descriptors that a service manager passes to the daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Activation {
    sockets: Vec<Passed>,
    /// What an earlier daemon has stored, with its names.
    stored: Vec<(RawFd, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Passed {
    fd: RawFd,
    name: String,
    role: Role,
    /// The CID in the name.
    cid: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Vmm,
    Host,
}

impl Activation {
    /// Takes the sockets from the environment. One that is named `vhost-user` is for the VMM, one named `host` for host programs;
    /// `-<CID>` behind the name says of which VM. Others are assigned in this order.
    ///
    /// # Errors
    /// The environment can't be read, or there are more sockets than the daemon can use.
    pub fn from_env() -> Result<Self, ConfigError> {
        match sd_notify::listen_fds_with_names() {
            Ok(sockets) => Self::new(sockets),
            Err(error) => Err(ConfigError::Activation(error.to_string())),
        }
    }

    pub(super) fn new(sockets: impl Iterator<Item = (RawFd, String)>) -> Result<Self, ConfigError> {
        let (stored, sockets): (Vec<_>, Vec<_>) =
            sockets.partition(|(_, name)| handover::is_stored(name));
        let mut taken = Self {
            stored,
            sockets: Vec::new(),
        };
        let (named, others): (Vec<_>, Vec<_>) = sockets
            .into_iter()
            .partition(|(_, name)| meaning(name).is_some());
        for (fd, name) in named.into_iter().chain(others) {
            let (role, cid) = meaning(&name).unwrap_or_else(|| {
                let role = if taken.find(Role::Vmm, None).is_none() {
                    Role::Vmm
                } else {
                    Role::Host
                };
                (role, None)
            });
            if taken.find(role, cid).is_some() {
                return Err(mistake(fd, &name, "is one too many"));
            }
            taken.sockets.push(Passed {
                fd,
                name,
                role,
                cid,
            });
        }
        Ok(taken)
    }

    /// What an earlier daemon has stored with the service manager, with its names.
    pub fn stored(&self) -> &[(RawFd, String)] {
        &self.stored
    }

    /// Whether a socket for a VMM is among them.
    pub fn has_vmm_socket(&self) -> bool {
        self.sockets.iter().any(|socket| socket.role == Role::Vmm)
    }

    /// Checks that each socket belongs to one of the VMs with these CIDs.
    pub(super) fn check(&self, cids: impl Iterator<Item = u64>) -> Result<(), ConfigError> {
        let cids: Vec<u64> = cids.collect();
        for Passed {
            fd,
            name,
            role,
            cid,
        } in &self.sockets
        {
            let is_twice = || cid.is_some() && self.find(*role, None).is_some();
            match cid {
                Some(cid) if !cids.contains(cid) => {
                    return Err(mistake(*fd, name, "is for a CID that no VM has"));
                }
                None if cids.len() > 1 => {
                    let hint = "is for one of several VMs: name it vhost-user-<CID> or host-<CID>";
                    return Err(mistake(*fd, name, hint));
                }
                _ if is_twice() => return Err(mistake(*fd, name, "is one too many")),
                _ => {}
            }
        }
        Ok(())
    }

    /// The sockets of the VM with this CID, which may be the only one.
    pub(super) fn sockets(&self, cid: u64, is_only: bool) -> InheritedSockets {
        let find = |role| {
            let unnamed = || self.find(role, None).filter(|_| is_only);
            self.find(role, Some(cid)).or_else(unnamed)
        };
        InheritedSockets {
            socket: find(Role::Vmm),
            uds: find(Role::Host),
        }
    }

    fn find(&self, role: Role, cid: Option<u64>) -> Option<RawFd> {
        let mut sockets = self.sockets.iter();
        let found = sockets.find(|socket| socket.role == role && socket.cid == cid);
        found.map(|socket| socket.fd)
    }
}

fn mistake(fd: RawFd, name: &str, what: &str) -> ConfigError {
    ConfigError::Activation(format!("descriptor {fd} ({name}) {what}"))
}

/// What a name says about its socket.
fn meaning(name: &str) -> Option<(Role, Option<u64>)> {
    [(VMM, Role::Vmm), (HOST, Role::Host)]
        .into_iter()
        .find_map(|(prefix, role)| {
            let rest = name.strip_prefix(prefix)?;
            match rest.strip_prefix('-') {
                Some(cid) => cid.parse().ok().map(|cid| (role, Some(cid))),
                None => rest.is_empty().then_some((role, None)),
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(sockets: &[(RawFd, &str)]) -> Result<Activation, ConfigError> {
        Activation::new(sockets.iter().map(|(fd, name)| (*fd, (*name).to_owned())))
    }

    #[test]
    fn sockets_of_the_service_manager_have_names_or_an_order() {
        let taken = |sockets: &[(RawFd, &str)]| {
            let InheritedSockets { socket, uds } = new(sockets).unwrap().sockets(4, true);
            (socket, uds)
        };
        assert_eq!(taken(&[]), (None, None));
        assert_eq!(taken(&[(3, "x.socket")]), (Some(3), None));
        assert_eq!(taken(&[(3, "x"), (4, "x")]), (Some(3), Some(4)));
        let by_name = (Some(4), Some(3));
        assert_eq!(taken(&[(3, "host"), (4, "vhost-user")]), by_name);
        assert_eq!(taken(&[(3, "x"), (4, "vhost-user")]), by_name);
        assert_eq!(taken(&[(3, "host-4"), (4, "vhost-user-4")]), by_name);
        assert!(new(&[(3, "host"), (4, "host")]).is_err());
        assert!(new(&[(3, "a"), (4, "b"), (5, "c")]).is_err());
    }

    #[test]
    fn what_a_daemon_has_stored_is_no_socket_to_listen_on() {
        let activation = new(&[(3, "handover-0"), (4, "x"), (5, "handover-4-state")]).unwrap();
        let stored = [(3, "handover-0".into()), (5, "handover-4-state".into())];
        assert_eq!(activation.stored(), stored);
        assert_eq!(activation.sockets(4, true).socket, Some(4));
        assert!(
            !new(&stored.map(|(fd, _)| (fd, "handover-x")))
                .unwrap()
                .has_vmm_socket()
        );
    }

    #[test]
    fn with_several_vms_a_name_has_the_cid() {
        let sockets = [(3, "host-5"), (4, "vhost-user-4"), (5, "vhost-user-5")];
        let activation = new(&sockets).unwrap();
        assert_eq!(activation.check([4, 5].into_iter()), Ok(()));
        let [socket, uds] = [4, 5].map(|cid| activation.sockets(cid, false));
        assert_eq!((socket.socket, socket.uds), (Some(4), None));
        assert_eq!((uds.socket, uds.uds), (Some(5), Some(3)));
        for (sockets, cids, message) in [
            (
                &sockets[..],
                &[4, 6][..],
                "descriptor 3 (host-5) is for a CID",
            ),
            (&[(3, "host")], &[4, 5], "vhost-user-<CID> or host-<CID>"),
            (&[(3, "x")], &[4, 5], "vhost-user-<CID> or host-<CID>"),
            (&[(3, "host"), (4, "host-4")], &[4], "one too many"),
        ] {
            let error = new(sockets).unwrap().check(cids.iter().copied());
            let error = error.unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        assert!(new(&[(3, "host-5"), (4, "host-5")]).is_err());
    }
}
