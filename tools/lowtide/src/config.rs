//! Descriptions of clusters and nodes in TOML.
//!
//! A cluster file lists every node and, for clients, the proxy through which each server is
//! reached. A node file points to a cluster file and says which of its nodes this process is and
//! where it keeps its state. `run` writes both; for a real cluster they are written by hand.
//!
//! Invariant: a [`Cluster`] that was loaded is consistent (unique names, ids and addresses, one
//! root, routes between existing nodes of the right roles), so nobody checks that again.
//!
//! Every error names file, line and column, and what was expected there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use lowtide_engine::node::Role;
use serde::{Deserialize, Serialize};
use toml::Spanned;

/// Version of both formats, checked when a file is loaded.
pub const VERSION: u32 = 1;

/// A mistake in a configuration file, or a file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}{}: {message}", file.display(), position.map(|(l, c)| format!(":{l}:{c}")).unwrap_or_default())]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// Line and column of the mistake, from 1.
    pub position: Option<(usize, usize)>,
    /// What is wrong and what was expected.
    pub message: String,
}

/// One node of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Unique name, for people: `meta1`.
    pub name: String,
    /// Unique number, never reused for another node of the same cluster.
    pub id: u32,
    /// What it does.
    pub role: Role,
    /// Where its datagrams arrive.
    pub address: SocketAddr,
    /// Name of the router that it pings instead of the root.
    pub parent: Option<String>,
}

/// A client reaches a server through a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Name of the client.
    pub client: String,
    /// Name of the server.
    pub home: String,
    /// Name of the proxy.
    pub proxy: String,
}

/// A whole cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// Every node.
    pub members: Vec<Member>,
    /// Ways through proxies; a pair without an entry talks directly.
    pub routes: Vec<Route>,
}

/// What one node process is told.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeFile {
    /// The cluster it belongs to.
    pub cluster: Cluster,
    /// Which of the cluster's members it is.
    pub member: Member,
    /// Where it keeps its state; `None` for roles without any.
    pub dir: Option<PathBuf>,
    /// Unix socket on which it takes orders.
    pub control: PathBuf,
    /// Transport.
    pub provider: Provider,
    /// Share of sent datagrams that are dropped, in percent.
    pub loss_percent: f64,
    /// Seed of everything random in the node.
    pub seed: u64,
    /// Whether pages not yet synced are recorded, so that a power failure can be played.
    pub record_unsynced: bool,
    /// Shards of a server, 1 to 64; `None` is one per core.
    pub shards: Option<u32>,
    /// At the root, milliseconds of silence after which it evicts a client or proxy, at least 1;
    /// `None` is 30 s.
    pub evict_after_ms: Option<u64>,
}

/// Which transport carries the messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// `run`: a hardware adapter, else the kernel's soft-RoCE, else softroce. Elsewhere softroce, since
    /// all nodes of a cluster must choose alike.
    #[default]
    Auto,
    /// Lowtide's own RoCEv2 over UDP sockets.
    Softroce,
    /// Shared memory between processes of this machine.
    Host,
    /// libibverbs.
    Verbs,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCluster {
    version: Spanned<u32>,
    node: Vec<RawMember>,
    #[serde(default)]
    route: Vec<RawRoute>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMember {
    name: Spanned<String>,
    id: Spanned<u32>,
    role: Spanned<Role>,
    address: Spanned<SocketAddr>,
    parent: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRoute {
    client: Spanned<String>,
    home: Spanned<String>,
    proxy: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    version: Spanned<u32>,
    cluster: PathBuf,
    name: Spanned<String>,
    dir: Option<PathBuf>,
    control: PathBuf,
    #[serde(default)]
    provider: Provider,
    #[serde(default)]
    loss_percent: Option<Spanned<f64>>,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    record_unsynced: bool,
    #[serde(default)]
    shards: Option<Spanned<u32>>,
    #[serde(default)]
    evict_after_ms: Option<Spanned<u64>>,
}

/// A file's text together with its name, for errors that point into it.
struct Source<'a> {
    file: &'a Path,
    text: String,
}

impl<'a> Source<'a> {
    fn open(file: &'a Path) -> Result<Source<'a>, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|error| ConfigError {
            file: file.to_owned(),
            position: None,
            message: error.to_string(),
        })?;
        Ok(Source { file, text })
    }

    fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text)
            .map_err(|error| self.error(error.span(), error.message().trim().replace('\n', ", ")))
    }

    fn error(&self, span: Option<Range<usize>>, message: impl Into<String>) -> ConfigError {
        let position = span.map(|span| {
            let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
            let line = before.iter().filter(|b| **b == b'\n').count() + 1;
            let start = before
                .iter()
                .rposition(|b| *b == b'\n')
                .map_or(0, |i| i + 1);
            let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
            (line, column)
        });
        ConfigError {
            file: self.file.to_owned(),
            position,
            message: message.into(),
        }
    }

    fn check_version(&self, version: &Spanned<u32>) -> Result<(), ConfigError> {
        if *version.get_ref() == VERSION {
            return Ok(());
        }
        Err(self.error(
            Some(version.span()),
            format!(
                "version {} is not supported, expected {VERSION}",
                version.get_ref()
            ),
        ))
    }
}

impl Cluster {
    /// Loads and checks a cluster file.
    ///
    /// # Errors
    /// The first mistake, with its place.
    pub fn load(file: &Path) -> Result<Cluster, ConfigError> {
        let source = Source::open(file)?;
        let raw: RawCluster = source.parse()?;
        source.check_version(&raw.version)?;
        let members = check_members(&source, raw.node)?;
        let routes = check_routes(&source, &members, raw.route)?;
        Ok(Cluster { members, routes })
    }

    /// The member of this name.
    #[must_use]
    pub fn member(&self, name: &str) -> Option<&Member> {
        self.members.iter().find(|m| m.name == name)
    }

    /// Members of one role, in file order.
    pub fn of_role(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |m| m.role == role)
    }

    /// The text that [`Cluster::load`] reads back.
    #[must_use]
    pub fn to_toml(&self) -> String {
        #[derive(Serialize)]
        struct Out<'a> {
            version: u32,
            node: Vec<OutMember<'a>>,
            #[serde(skip_serializing_if = "Vec::is_empty")]
            route: Vec<BTreeMap<&'static str, &'a str>>,
        }
        #[derive(Serialize)]
        struct OutMember<'a> {
            name: &'a str,
            id: u32,
            role: Role,
            address: SocketAddr,
            #[serde(skip_serializing_if = "Option::is_none")]
            parent: Option<&'a str>,
        }
        let out = Out {
            version: VERSION,
            node: self
                .members
                .iter()
                .map(|m| OutMember {
                    name: &m.name,
                    id: m.id,
                    role: m.role,
                    address: m.address,
                    parent: m.parent.as_deref(),
                })
                .collect(),
            route: self
                .routes
                .iter()
                .map(|r| {
                    BTreeMap::from([
                        ("client", r.client.as_str()),
                        ("home", r.home.as_str()),
                        ("proxy", r.proxy.as_str()),
                    ])
                })
                .collect(),
        };
        toml::to_string(&out).expect("plain tables of strings and numbers")
    }
}

fn check_members(source: &Source, raw: Vec<RawMember>) -> Result<Vec<Member>, ConfigError> {
    let mut names = BTreeSet::new();
    let mut ids = BTreeSet::new();
    let mut addresses = BTreeSet::new();
    let mut roots = 0;
    let mut members = Vec::with_capacity(raw.len());
    check_parents(source, &raw)?;
    for node in raw {
        let at = |span, message: String| Err(source.error(Some(span), message));
        let name = node.name.get_ref();
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if name.is_empty() || name.len() > 64 || !name.bytes().all(is_plain) {
            return at(
                node.name.span(),
                format!("'{name}' is no node name, expected 1 to 64 letters, digits, '-' or '_'"),
            );
        }
        if !names.insert(name.clone()) {
            return at(
                node.name.span(),
                format!("another node is already called '{name}'"),
            );
        }
        let id = *node.id.get_ref();
        if id == 0 || !ids.insert(id) {
            return at(
                node.id.span(),
                format!("id {id} is 0 or used by another node, expected a unique number from 1"),
            );
        }
        let address = *node.address.get_ref();
        let ip = address.ip();
        if address.port() == 0 || ip.is_unspecified() || ip.is_multicast() {
            return at(
                node.address.span(),
                format!("nobody reaches {address}, expected one host's IP address and a port"),
            );
        }
        if !addresses.insert(address) {
            return at(
                node.address.span(),
                format!("another node already has address {address}"),
            );
        }
        let role = *node.role.get_ref();
        roots += u32::from(role == Role::Root);
        if role == Role::Root && roots > 1 {
            return at(
                node.role.span(),
                "a second root, expected exactly one".to_owned(),
            );
        }
        members.push(Member {
            name: node.name.into_inner(),
            id,
            role,
            address,
            parent: node.parent.map(Spanned::into_inner),
        });
    }
    for (role, what) in [
        (Role::Root, "a node with role = \"root\""),
        (Role::Meta, "at least one node with role = \"meta\""),
        (Role::Object, "at least one node with role = \"object\""),
    ] {
        if !members.iter().any(|m| m.role == role) {
            return Err(source.error(None, format!("expected {what}")));
        }
    }
    Ok(members)
}

/// Proxies and clients may have a router above them, nobody else anything but the root.
fn check_parents(source: &Source, raw: &[RawMember]) -> Result<(), ConfigError> {
    for node in raw {
        let Some(parent) = &node.parent else {
            continue;
        };
        let above = raw.iter().find(|m| m.name.get_ref() == parent.get_ref());
        if above.is_none_or(|m| *m.role.get_ref() != Role::Router) {
            let message = format!("'{}' is no router, expected one", parent.get_ref());
            return Err(source.error(Some(parent.span()), message));
        }
        let role = *node.role.get_ref();
        if !matches!(role, Role::Proxy | Role::Client) {
            let message = format!("a {role} pings the root, expected no parent");
            return Err(source.error(Some(parent.span()), message));
        }
    }
    Ok(())
}

fn check_routes(
    source: &Source,
    members: &[Member],
    raw: Vec<RawRoute>,
) -> Result<Vec<Route>, ConfigError> {
    let check = |name: &Spanned<String>, roles: &[Role], what: &str| {
        let role = members
            .iter()
            .find(|m| m.name == *name.get_ref())
            .map(|m| m.role);
        match role {
            Some(role) if roles.contains(&role) => Ok(()),
            Some(role) => Err(source.error(
                Some(name.span()),
                format!("'{}' is a {role}, expected {what}", name.get_ref()),
            )),
            None => Err(source.error(
                Some(name.span()),
                format!("no node is called '{}', expected {what}", name.get_ref()),
            )),
        }
    };
    let mut pairs = BTreeSet::new();
    let mut routes = Vec::with_capacity(raw.len());
    for route in raw {
        check(&route.client, &[Role::Client], "a client")?;
        check(
            &route.home,
            &[Role::Meta, Role::Object],
            "a meta or object server",
        )?;
        check(&route.proxy, &[Role::Proxy], "a proxy")?;
        let span = route.client.span();
        let route = Route {
            client: route.client.into_inner(),
            home: route.home.into_inner(),
            proxy: route.proxy.into_inner(),
        };
        if !pairs.insert((route.client.clone(), route.home.clone())) {
            return Err(source.error(
                Some(span),
                format!("a second route from {} to {}", route.client, route.home),
            ));
        }
        routes.push(route);
    }
    Ok(routes)
}

impl NodeFile {
    /// Loads a node file and the cluster file it names. Relative paths are relative to the
    /// directory of the node file.
    ///
    /// # Errors
    /// The first mistake in either file, with its place.
    pub fn load(file: &Path) -> Result<NodeFile, ConfigError> {
        let source = Source::open(file)?;
        let raw: RawNode = source.parse()?;
        source.check_version(&raw.version)?;
        let base = file.parent().unwrap_or(Path::new("."));
        let cluster = Cluster::load(&base.join(&raw.cluster))?;
        let Some(member) = cluster.member(raw.name.get_ref()).cloned() else {
            return Err(source.error(
                Some(raw.name.span()),
                format!(
                    "the cluster has no node '{}', expected one of {}",
                    raw.name.get_ref(),
                    cluster
                        .members
                        .iter()
                        .map(|m| m.name.as_str())
                        .collect::<Vec<_>>()
                        .join(", ")
                ),
            ));
        };
        if member.role.is_persistent() && raw.dir.is_none() {
            return Err(source.error(
                Some(raw.name.span()),
                format!(
                    "{} is a {}, expected dir = \"…\" for its state",
                    member.name, member.role
                ),
            ));
        }
        let loss_percent = match &raw.loss_percent {
            None => 0.0,
            Some(loss) if (0.0..100.0).contains(loss.get_ref()) => *loss.get_ref(),
            Some(loss) => {
                return Err(source.error(
                    Some(loss.span()),
                    format!(
                        "{} is no loss rate, expected 0.0 to below 100.0",
                        loss.get_ref()
                    ),
                ));
            }
        };
        if let Some(shards) = raw
            .shards
            .as_ref()
            .filter(|n| !(1..=64).contains(n.get_ref()))
        {
            let message = format!("{} shards, expected 1 to 64", shards.get_ref());
            return Err(source.error(Some(shards.span()), message));
        }
        if let Some(zero) = raw.evict_after_ms.as_ref().filter(|ms| *ms.get_ref() == 0) {
            let message = "0 ms of silence would evict everybody, expected 1 or more";
            return Err(source.error(Some(zero.span()), message));
        }
        Ok(NodeFile {
            shards: raw.shards.map(Spanned::into_inner),
            evict_after_ms: raw.evict_after_ms.map(Spanned::into_inner),
            dir: raw
                .dir
                .filter(|_| member.role.is_persistent())
                .map(|dir| base.join(dir)),
            control: base.join(raw.control),
            provider: raw.provider,
            loss_percent,
            seed: raw.seed,
            record_unsynced: raw.record_unsynced,
            cluster,
            member,
        })
    }

    /// The text that [`NodeFile::load`] reads back; the cluster is only referred to.
    #[must_use]
    pub fn to_toml(&self, cluster_file: &Path) -> String {
        #[derive(Serialize)]
        struct Out<'a> {
            version: u32,
            cluster: &'a Path,
            name: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            dir: Option<&'a Path>,
            control: &'a Path,
            provider: Provider,
            loss_percent: f64,
            seed: u64,
            record_unsynced: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            shards: Option<u32>,
            #[serde(skip_serializing_if = "Option::is_none")]
            evict_after_ms: Option<u64>,
        }
        toml::to_string(&Out {
            version: VERSION,
            cluster: cluster_file,
            name: &self.member.name,
            dir: self.dir.as_deref(),
            control: &self.control,
            provider: self.provider,
            loss_percent: self.loss_percent,
            // TOML integers are signed.
            seed: self.seed & i64::MAX as u64,
            record_unsynced: self.record_unsynced,
            shards: self.shards,
            evict_after_ms: self.evict_after_ms,
        })
        .expect("plain values; paths of a run are UTF-8")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
version = 1
[[node]]
name = "root"
id = 1
role = "root"
address = "127.9.9.1:4791"
[[node]]
name = "meta0"
id = 2
role = "meta"
address = "127.9.9.2:4791"
[[node]]
name = "object0"
id = 3
role = "object"
address = "127.9.9.3:4791"
[[node]]
name = "proxy0"
id = 4
role = "proxy"
address = "127.9.9.4:4791"
[[node]]
name = "client0"
id = 5
role = "client"
address = "127.9.9.5:4791"
parent = "router0"
[[node]]
name = "router0"
id = 6
role = "router"
address = "127.9.9.6:4791"
[[route]]
client = "client0"
home = "meta0"
proxy = "proxy0"
"#;

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let file = dir.join(name);
        std::fs::write(&file, text).unwrap();
        file
    }

    #[test]
    fn a_cluster_is_read_back_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::load(&write(dir.path(), "a.toml", GOOD)).unwrap();
        assert_eq!(cluster.members.len(), 6);
        assert_eq!(cluster.members[4].parent.as_deref(), Some("router0"));
        assert_eq!(cluster.routes[0].proxy, "proxy0");
        let again = Cluster::load(&write(dir.path(), "b.toml", &cluster.to_toml())).unwrap();
        assert_eq!(again, cluster);
    }

    #[test]
    fn mistakes_in_a_cluster_are_located() {
        let dir = tempfile::tempdir().unwrap();
        // What to replace in the good file, with what, then line, column and a part of the message.
        let table = [
            ("version = 1", "version = 2", Some((2, 11)), "expected 1"),
            ("id = 1\n", "id = \"one\"\n", Some((5, 6)), "expected u32"),
            (
                "role = \"meta\"",
                "role = \"mata\"",
                Some((11, 8)),
                "expected one of",
            ),
            (
                "role = \"meta\"",
                "rule = \"meta\"",
                Some((11, 1)),
                "unknown field",
            ),
            ("id = 2", "id = 1", Some((10, 6)), "used by another"),
            (
                "name = \"meta0\"",
                "name = \"root\"",
                Some((9, 8)),
                "already called",
            ),
            (
                "name = \"meta0\"",
                "name = \"a/b\"",
                Some((9, 8)),
                "no node name",
            ),
            (
                "127.9.9.2:4791",
                "127.9.9.2:0",
                Some((12, 11)),
                "nobody reaches",
            ),
            (
                "127.9.9.2:4791",
                "0.0.0.0:4791",
                Some((12, 11)),
                "nobody reaches",
            ),
            (
                "127.9.9.2:4791",
                "127.9.9.1:4791",
                Some((12, 11)),
                "already has",
            ),
            (
                "127.9.9.2:4791",
                "127.9.9.2",
                Some((12, 11)),
                "socket address",
            ),
            (
                "role = \"object\"",
                "role = \"root\"",
                Some((16, 8)),
                "second root",
            ),
            (
                "role = \"object\"",
                "role = \"meta\"",
                None,
                "role = \"object\"",
            ),
            (
                "parent = \"router0\"",
                "parent = \"meta0\"",
                Some((28, 10)),
                "no router",
            ),
            (
                "role = \"meta\"\n",
                "role = \"meta\"\nparent = \"router0\"\n",
                Some((12, 10)),
                "a meta pings the root",
            ),
            (
                "proxy = \"proxy0\"",
                "proxy = \"proxy9\"",
                Some((37, 9)),
                "no node is called",
            ),
            (
                "proxy = \"proxy0\"",
                "proxy = \"root\"",
                Some((37, 9)),
                "expected a proxy",
            ),
            ("[[route]]", "[[route]", Some((34, 9)), "expected"),
        ];
        for (from, to, position, message) in table {
            assert!(GOOD.contains(from), "{from}");
            let file = write(dir.path(), "c.toml", &GOOD.replacen(from, to, 1));
            let error = Cluster::load(&file).unwrap_err();
            assert_eq!(error.position, position, "{to}: {error}");
            assert!(error.message.contains(message), "{to}: {error}");
            assert!(error.to_string().contains("c.toml"), "{error}");
        }
    }

    #[test]
    fn a_node_file_names_its_node_and_its_state() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "cluster.toml", GOOD);
        let text = "version = 1\ncluster = \"cluster.toml\"\nname = \"meta0\"\n\
                    dir = \"data\"\ncontrol = \"control.sock\"\nseed = 7\nshards = 4\n\
                    evict_after_ms = 60000\n";
        let node = NodeFile::load(&write(dir.path(), "node.toml", text)).unwrap();
        assert_eq!(node.member.id, 2);
        assert_eq!(node.dir, Some(dir.path().join("data")));
        assert_eq!((node.loss_percent, node.seed), (0.0, 7));
        assert_eq!((node.shards, node.evict_after_ms), (Some(4), Some(60_000)));
        let again = write(
            dir.path(),
            "again.toml",
            &node.to_toml(Path::new("cluster.toml")),
        );
        assert_eq!(NodeFile::load(&again).unwrap(), node);

        let table = [
            (
                "name = \"meta0\"",
                "name = \"meta7\"",
                Some((3, 8)),
                "meta0, object0",
            ),
            ("dir = \"data\"\n", "", Some((3, 8)), "expected dir"),
            (
                "seed = 7",
                "loss_percent = 100.0",
                Some((6, 16)),
                "below 100",
            ),
            ("seed = 7", "provider = \"tcp\"", Some((6, 12)), "softroce"),
            ("control", "cntrl", Some((5, 1)), "unknown field"),
            ("shards = 4", "shards = 0", Some((7, 10)), "1 to 64"),
            ("60000", "0", Some((8, 18)), "1 or more"),
        ];
        for (from, to, position, message) in table {
            let file = write(dir.path(), "bad.toml", &text.replacen(from, to, 1));
            let error = NodeFile::load(&file).unwrap_err();
            assert_eq!(error.position, position, "{to}: {error}");
            assert!(error.message.contains(message), "{to}: {error}");
        }
        let error = NodeFile::load(&dir.path().join("absent.toml")).unwrap_err();
        assert!(error.to_string().contains("absent.toml: No such file"));
    }
}
