//! Makes the description of a local cluster and writes the files its nodes read.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::config::{Cluster, Member, NodeFile, Provider, Role, Route};
use crate::fault::{NodeName, Shape};

/// Settings that all nodes of a run share.
#[derive(Clone, Copy, Debug)]
pub struct Common {
    /// Transport.
    pub provider: Provider,
    /// Share of sent datagrams that are dropped, in percent.
    pub loss_percent: f64,
    /// Seed of the run; every node gets one of its own made from it.
    pub seed: u64,
    /// Whether pages not yet synced are recorded.
    pub record_unsynced: bool,
    /// Shards of each server.
    pub shards: u32,
    /// Silence after which the root evicts a client or proxy, in milliseconds.
    pub evict_after_ms: u64,
}

/// The machine's cores shared out to `servers`, at least one for each.
#[must_use]
pub fn shards_for(servers: u32) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    (cores / servers.max(1)).clamp(1, 64)
}

/// Names, numbers and ways of a cluster of this shape; `addresses` holds one per node.
///
/// Clients reach servers through proxies, and the servers of one client are spread over all
/// proxies: so an operation on two servers travels in the windows of two proxies, and two clients
/// meet at a server through different proxies. Without proxies they talk directly. Proxies and
/// clients, whose bounds make the minimum, are spread over the routers too.
#[must_use]
pub fn cluster(shape: &Shape, addresses: &[SocketAddr]) -> Cluster {
    let names = [
        Role::Root,
        Role::Meta,
        Role::Object,
        Role::Proxy,
        Role::Client,
        Role::Router,
    ]
    .into_iter()
    .flat_map(|role| (0..shape.count(role)).map(move |index| NodeName { role, index }));
    let parent = |name: NodeName| {
        let counted = matches!(name.role, Role::Proxy | Role::Client);
        let router = NodeName {
            role: Role::Router,
            index: name.index.checked_rem(shape.router)?,
        };
        counted.then(|| router.to_string())
    };
    let members: Vec<Member> = (1..)
        .zip(names)
        .zip(addresses)
        .map(|((id, name), address)| Member {
            name: name.to_string(),
            id,
            role: name.role,
            address: *address,
            parent: parent(name),
        })
        .collect();
    let of = |role| members.iter().filter(move |m| m.role == role);
    let proxies: Vec<&Member> = of(Role::Proxy).collect();
    let mut routes = Vec::new();
    if !proxies.is_empty() {
        for (c, client) in of(Role::Client).enumerate() {
            for (h, home) in of(Role::Meta)
                .enumerate()
                .chain(of(Role::Object).enumerate())
            {
                routes.push(Route {
                    client: client.name.clone(),
                    home: home.name.clone(),
                    proxy: proxies[(c + h) % proxies.len()].name.clone(),
                });
            }
        }
    }
    Cluster { members, routes }
}

/// Writes `cluster.toml` and each node's directory and file below `state`.
///
/// # Errors
/// The path that could not be written.
pub fn write(state: &Path, cluster: &Cluster, common: &Common) -> Result<(), (PathBuf, io::Error)> {
    let put = |path: PathBuf, text: String| std::fs::write(&path, text).map_err(|e| (path, e));
    put(state.join("cluster.toml"), cluster.to_toml())?;
    for member in &cluster.members {
        let dir = state.join(&member.name);
        std::fs::create_dir(&dir).map_err(|e| (dir.clone(), e))?;
        let node = NodeFile {
            cluster: Cluster::default(),
            member: member.clone(),
            dir: member.role.is_persistent().then(|| "data".into()),
            control: "control.sock".into(),
            provider: common.provider,
            loss_percent: common.loss_percent,
            seed: common
                .seed
                .wrapping_mul(1_000_003)
                .wrapping_add(u64::from(member.id)),
            record_unsynced: common.record_unsynced && member.role.is_persistent(),
            shards: matches!(member.role, Role::Meta | Role::Object).then_some(common.shards),
            evict_after_ms: (member.role == Role::Root).then_some(common.evict_after_ms),
        };
        put(
            dir.join("node.toml"),
            node.to_toml(Path::new("../cluster.toml")),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_loaded_and_spreads_over_the_proxies() {
        let shape = Shape {
            meta: 2,
            object: 2,
            proxy: 2,
            client: 2,
            router: 1,
        };
        let addresses: Vec<SocketAddr> = (1..=10).map(|z| ([127, 1, 1, z], 4791).into()).collect();
        let cluster = cluster(&shape, &addresses);
        let names: Vec<&str> = cluster.members.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "root", "meta0", "meta1", "object0", "object1", "proxy0", "proxy1", "client0",
                "client1", "router0"
            ]
        );
        let parent = |name: &str| cluster.member(name).unwrap().parent.as_deref();
        assert_eq!(parent("client1"), Some("router0"));
        assert_eq!(parent("meta0"), None);
        let via = |client: &str, home: &str| {
            let mut found = cluster
                .routes
                .iter()
                .filter(|r| r.client == client && r.home == home);
            let proxy = found.next().unwrap().proxy.as_str();
            assert!(found.next().is_none());
            proxy
        };
        assert_ne!(via("client0", "meta0"), via("client0", "meta1"));
        assert_ne!(via("client0", "meta0"), via("client1", "meta0"));

        let tmp = tempfile::tempdir().unwrap();
        let common = Common {
            provider: Provider::Softroce,
            loss_percent: 10.0,
            seed: u64::MAX,
            record_unsynced: true,
            shards: 3,
            evict_after_ms: 4_000,
        };
        write(tmp.path(), &cluster, &common).unwrap();
        let meta = NodeFile::load(&tmp.path().join("meta1/node.toml")).unwrap();
        assert_eq!(meta.cluster, cluster);
        assert_eq!(meta.dir, Some(tmp.path().join("meta1/data")));
        assert!(meta.record_unsynced);
        let proxy = NodeFile::load(&tmp.path().join("proxy1/node.toml")).unwrap();
        assert_eq!((proxy.dir, proxy.record_unsynced), (None, false));
        assert_eq!((meta.shards, proxy.shards), (Some(3), None));
        let root = NodeFile::load(&tmp.path().join("root/node.toml")).unwrap();
        assert_eq!(
            (root.evict_after_ms, meta.evict_after_ms),
            (Some(4_000), None)
        );
        assert_eq!(proxy.loss_percent, 10.0);
        assert_ne!(proxy.seed, meta.seed);
    }

    #[test]
    fn without_proxies_there_are_no_routes() {
        let shape = Shape {
            meta: 1,
            object: 1,
            proxy: 0,
            client: 3,
            router: 0,
        };
        let addresses: Vec<SocketAddr> = (1..=6).map(|z| ([127, 1, 1, z], 4791).into()).collect();
        let cluster = cluster(&shape, &addresses);
        assert_eq!(cluster.members.len(), 6);
        assert!(cluster.routes.is_empty());
        assert!(cluster.members.iter().all(|m| m.parent.is_none()));
    }
}
