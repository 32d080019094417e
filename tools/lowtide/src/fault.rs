//! `--fault SPEC`: what to break, where, and at which share of the work.
//!
//! Owns the grammar and its validation against the shape of a cluster:
//!
//! ```text
//! kill:ROLEn@P%       SIGKILL at P percent of the work, then a restart
//! kill:ROLEn@P%!      SIGKILL, never restarted (clients, proxies and routers)
//! pause:ROLEn@P%:MS   SIGSTOP for MS milliseconds
//! partition:A,B@P%:MS A and B drop each other's datagrams for MS milliseconds
//! loss:PCT            every node drops PCT percent of the datagrams it sends, all the time
//! poweroff:ROLEn@P%   SIGKILL, and each page not yet synced becomes old, new or torn
//! ```
//!
//! `P%+MS` instead of `P%` is MS milliseconds after P percent of the work were done: so one fault
//! can strike while the cluster still recovers from another.
//!
//! Deliberately absent: how a fault is injected (`supervisor::chaos`).

use std::fmt;
use std::str::FromStr;

use crate::config::Role;

/// A node of a cluster by role and index: `meta1`, `root`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName {
    /// Role of the node.
    pub role: Role,
    /// Index among the nodes of that role, from 0.
    pub index: u32,
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            Role::Root => write!(f, "root"),
            role => write!(f, "{role}{}", self.index),
        }
    }
}

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Moment {
    /// Share of the work that must be done, in percent, 0 to 100.
    pub percent: f64,
    /// Milliseconds after that, at most an hour.
    pub delay_ms: u64,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.percent)?;
        match self.delay_ms {
            0 => Ok(()),
            ms => write!(f, "+{ms}"),
        }
    }
}

/// One fault of a run. Its `Display` is the specification it was parsed from.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// SIGKILL.
    Kill {
        /// Who dies.
        node: NodeName,
        /// When.
        at: Moment,
        /// Whether it comes back.
        restart: bool,
    },
    /// SIGSTOP, then SIGCONT.
    Pause {
        /// Who stops.
        node: NodeName,
        /// When.
        at: Moment,
        /// For how long, in milliseconds.
        duration_ms: u64,
    },
    /// Two nodes do not hear each other.
    Partition {
        /// One side.
        a: NodeName,
        /// The other side.
        b: NodeName,
        /// When.
        at: Moment,
        /// For how long, in milliseconds.
        duration_ms: u64,
    },
    /// Datagrams are lost during the whole run.
    Loss {
        /// Share of datagrams dropped by each sender, in percent, below 100.
        percent: f64,
    },
    /// SIGKILL with loss of pages that were not synced.
    PowerOff {
        /// Whose power fails.
        node: NodeName,
        /// When.
        at: Moment,
    },
}

impl Fault {
    /// When the fault strikes; `None` when it holds during the whole run.
    #[must_use]
    pub fn at(&self) -> Option<Moment> {
        match self {
            Fault::Kill { at, .. }
            | Fault::Pause { at, .. }
            | Fault::Partition { at, .. }
            | Fault::PowerOff { at, .. } => Some(*at),
            Fault::Loss { .. } => None,
        }
    }

    /// The nodes it strikes.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeName> {
        match self {
            Fault::Kill { node, .. } | Fault::Pause { node, .. } | Fault::PowerOff { node, .. } => {
                vec![*node]
            }
            Fault::Partition { a, b, .. } => vec![*a, *b],
            Fault::Loss { .. } => Vec::new(),
        }
    }

    /// Refuses a fault that the cluster `shape` cannot have or cannot survive.
    ///
    /// # Errors
    /// Names the part of the specification that does not fit.
    pub fn validate(&self, shape: &Shape) -> Result<(), SpecError> {
        for node in self.nodes() {
            let count = shape.count(node.role);
            if node.index >= count {
                let reason = match count {
                    0 => format!("the cluster has no {}", node.role),
                    1 => format!("the cluster has one {}: {0}0", node.role),
                    n => format!(
                        "the cluster has {n} of this role: {0}0 to {0}{1}",
                        node.role,
                        n - 1
                    ),
                };
                return Err(self.error(&node.to_string(), reason));
            }
        }
        match self {
            Fault::Kill {
                node,
                restart: false,
                ..
            } if node.role.is_persistent() => Err(self.error(
                "!",
                format!(
                    "without {node} the work can never finish; only clients, proxies and routers \
                     may stay dead"
                ),
            )),
            Fault::Kill {
                node,
                restart: false,
                ..
            } if node.role != Role::Router && shape.count(node.role) < 2 => Err(self.error(
                "!",
                format!(
                    "{node} is the only {}; give the cluster another one",
                    node.role
                ),
            )),
            Fault::PowerOff { node, .. } if !node.role.is_persistent() => Err(self.error(
                &node.to_string(),
                format!("a {} keeps nothing on disk; use kill:", node.role),
            )),
            _ => Ok(()),
        }
    }

    fn error(&self, part: &str, reason: String) -> SpecError {
        SpecError {
            spec: self.to_string(),
            part: part.to_owned(),
            reason,
            example: match self {
                Fault::Kill { restart: true, .. } => EXAMPLE_KILL,
                Fault::Kill { .. } => EXAMPLE_KILL_FOR_GOOD,
                Fault::Pause { .. } => EXAMPLE_PAUSE,
                Fault::Partition { .. } => EXAMPLE_PARTITION,
                Fault::Loss { .. } => EXAMPLE_LOSS,
                Fault::PowerOff { .. } => EXAMPLE_POWEROFF,
            },
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Kill { node, at, restart } => {
                write!(f, "kill:{node}@{at}{}", if *restart { "" } else { "!" })
            }
            Fault::Pause {
                node,
                at,
                duration_ms,
            } => write!(f, "pause:{node}@{at}:{duration_ms}"),
            Fault::Partition {
                a,
                b,
                at,
                duration_ms,
            } => write!(f, "partition:{a},{b}@{at}:{duration_ms}"),
            Fault::Loss { percent } => write!(f, "loss:{percent}"),
            Fault::PowerOff { node, at } => write!(f, "poweroff:{node}@{at}"),
        }
    }
}

/// How many nodes of each role a cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Metadata servers.
    pub meta: u32,
    /// Object servers.
    pub object: u32,
    /// Proxies.
    pub proxy: u32,
    /// Clients.
    pub client: u32,
    /// Aggregators between the members and the root.
    pub router: u32,
}

impl Shape {
    /// How many nodes it has, the root included.
    #[must_use]
    pub fn total(&self) -> u32 {
        1 + self.meta + self.object + self.proxy + self.client + self.router
    }

    /// Nodes of one role.
    #[must_use]
    pub fn count(&self, role: Role) -> u32 {
        match role {
            Role::Root => 1,
            Role::Meta => self.meta,
            Role::Object => self.object,
            Role::Proxy => self.proxy,
            Role::Client => self.client,
            Role::Router => self.router,
        }
    }
}

/// A fault specification that means nothing, or nothing for this cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fault '{spec}': '{part}': {reason} (example: --fault {example})")]
pub struct SpecError {
    /// The whole specification.
    pub spec: String,
    /// The part of it that is wrong.
    pub part: String,
    /// What is wrong with it.
    pub reason: String,
    /// A specification of the same kind that is right.
    pub example: &'static str,
}

const EXAMPLE_KILL: &str = "kill:meta1@40%";
const EXAMPLE_KILL_FOR_GOOD: &str = "'kill:client1@30%!'";
const EXAMPLE_PAUSE: &str = "pause:client0@20%:5000";
const EXAMPLE_PARTITION: &str = "partition:proxy0,meta1@50%:5000";
const EXAMPLE_LOSS: &str = "loss:10";
const EXAMPLE_POWEROFF: &str = "poweroff:object0@60%";

/// Longest pause, partition or delay: one hour.
const DURATION_MS_MAX: u64 = 3_600_000;

impl FromStr for Fault {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Fault, SpecError> {
        let (kind, rest) = spec.split_once(':').unwrap_or((spec, ""));
        let parse = |example| Parser { spec, example };
        match kind {
            "kill" => {
                let p = parse(EXAMPLE_KILL);
                let (rest, restart) = match rest.strip_suffix('!') {
                    Some(rest) => (rest, false),
                    None => (rest, true),
                };
                let (node, at) = p.node_at(rest)?;
                Ok(Fault::Kill { node, at, restart })
            }
            "pause" => {
                let p = parse(EXAMPLE_PAUSE);
                let (place, duration_ms) = p.timed(rest)?;
                let (node, at) = p.node_at(place)?;
                Ok(Fault::Pause {
                    node,
                    at,
                    duration_ms,
                })
            }
            "partition" => {
                let p = parse(EXAMPLE_PARTITION);
                let (place, duration_ms) = p.timed(rest)?;
                let (pair, at) = p.split_at_sign(place)?;
                let (a, b) = pair
                    .split_once(',')
                    .ok_or_else(|| p.error(pair, "expected two nodes separated by a comma"))?;
                let (a, b) = (p.node(a)?, p.node(b)?);
                if a == b {
                    return Err(p.error(pair, "a node cannot be parted from itself"));
                }
                let at = p.moment(at)?;
                Ok(Fault::Partition {
                    a,
                    b,
                    at,
                    duration_ms,
                })
            }
            "loss" => {
                let p = parse(EXAMPLE_LOSS);
                let number = rest.strip_suffix('%').unwrap_or(rest);
                match p.number(number) {
                    Some(percent) if percent < 100.0 => Ok(Fault::Loss { percent }),
                    Some(_) => Err(p.error(rest, "with every datagram lost nothing can work")),
                    None => Err(p.error(rest, "expected a percentage from 0 to below 100")),
                }
            }
            "poweroff" => {
                let (node, at) = parse(EXAMPLE_POWEROFF).node_at(rest)?;
                Ok(Fault::PowerOff { node, at })
            }
            _ => Err(parse(EXAMPLE_KILL).error(
                kind,
                "unknown fault; expected kill, pause, partition, loss or poweroff",
            )),
        }
    }
}

struct Parser<'a> {
    spec: &'a str,
    example: &'static str,
}

impl Parser<'_> {
    fn error(&self, part: &str, reason: impl Into<String>) -> SpecError {
        SpecError {
            spec: self.spec.to_owned(),
            part: part.to_owned(),
            reason: reason.into(),
            example: self.example,
        }
    }

    /// `ROLEn@P%`
    fn node_at(&self, text: &str) -> Result<(NodeName, Moment), SpecError> {
        let (node, at) = self.split_at_sign(text)?;
        Ok((self.node(node)?, self.moment(at)?))
    }

    fn split_at_sign<'t>(&self, text: &'t str) -> Result<(&'t str, &'t str), SpecError> {
        text.split_once('@')
            .ok_or_else(|| self.error(text, "expected NODE@P%: the moment is missing"))
    }

    /// `…:MS`: the place and the duration.
    fn timed<'t>(&self, text: &'t str) -> Result<(&'t str, u64), SpecError> {
        let (place, ms) = text
            .rsplit_once(':')
            .ok_or_else(|| self.error(text, "expected NODE@P%:MS: the duration is missing"))?;
        Ok((place, self.milliseconds(ms)?))
    }

    fn node(&self, text: &str) -> Result<NodeName, SpecError> {
        let digits = text.bytes().rev().take_while(u8::is_ascii_digit).count();
        let (role, index) = text.split_at(text.len() - digits);
        let role = match role {
            "root" => Role::Root,
            "meta" => Role::Meta,
            "object" => Role::Object,
            "proxy" => Role::Proxy,
            "client" => Role::Client,
            "router" => Role::Router,
            _ => {
                return Err(self.error(
                    text,
                    "expected root, metaN, objectN, proxyN, clientN or routerN, N from 0",
                ));
            }
        };
        let index = match (role, index) {
            (Role::Root, "") => 0,
            (role, "") => {
                return Err(self.error(text, format!("which one? say {role}0, {role}1, …")));
            }
            (_, digits) => digits
                .parse()
                .map_err(|_| self.error(text, "the number is too large"))?,
        };
        Ok(NodeName { role, index })
    }

    /// `P%` or `P%+MS`
    fn moment(&self, text: &str) -> Result<Moment, SpecError> {
        let (share, delay_ms) = match text.split_once('+') {
            None => (text, 0),
            Some((share, ms)) => (share, self.milliseconds(ms)?),
        };
        let percent = share
            .strip_suffix('%')
            .and_then(|number| self.number(number))
            .ok_or_else(|| self.error(share, "expected a percentage from 0% to 100%"))?;
        Ok(Moment { percent, delay_ms })
    }

    fn milliseconds(&self, text: &str) -> Result<u64, SpecError> {
        let is_plain = text.bytes().all(|b| b.is_ascii_digit());
        let parsed = is_plain.then(|| text.parse().ok()).flatten();
        parsed
            .filter(|ms| (1..=DURATION_MS_MAX).contains(ms))
            .ok_or_else(|| {
                let reason = format!("expected milliseconds from 1 to {DURATION_MS_MAX}");
                self.error(text, reason)
            })
    }

    /// A plain decimal from 0 to 100; no sign, exponent, infinity.
    fn number(&self, text: &str) -> Option<f64> {
        let plain = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let value: f64 = plain.then(|| text.parse().ok()).flatten()?;
        (0.0..=100.0).contains(&value).then_some(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: Shape = Shape {
        meta: 2,
        object: 2,
        proxy: 2,
        client: 2,
        router: 2,
    };

    fn meta(index: u32) -> NodeName {
        NodeName {
            role: Role::Meta,
            index,
        }
    }

    fn after(percent: f64) -> Moment {
        Moment {
            percent,
            delay_ms: 0,
        }
    }

    #[test]
    fn every_form_is_understood() {
        let table = [
            (
                "kill:meta1@40%",
                Fault::Kill {
                    node: meta(1),
                    at: after(40.0),
                    restart: true,
                },
            ),
            (
                "kill:client0@12.5%!",
                Fault::Kill {
                    node: NodeName {
                        role: Role::Client,
                        index: 0,
                    },
                    at: after(12.5),
                    restart: false,
                },
            ),
            (
                "pause:root@0%:5000",
                Fault::Pause {
                    node: NodeName {
                        role: Role::Root,
                        index: 0,
                    },
                    at: after(0.0),
                    duration_ms: 5000,
                },
            ),
            (
                "partition:proxy0,meta1@50%:5000",
                Fault::Partition {
                    a: NodeName {
                        role: Role::Proxy,
                        index: 0,
                    },
                    b: meta(1),
                    at: after(50.0),
                    duration_ms: 5000,
                },
            ),
            (
                "kill:router1@40%+250",
                Fault::Kill {
                    node: NodeName {
                        role: Role::Router,
                        index: 1,
                    },
                    at: Moment {
                        percent: 40.0,
                        delay_ms: 250,
                    },
                    restart: true,
                },
            ),
            ("loss:10", Fault::Loss { percent: 10.0 }),
            (
                "poweroff:object0@100%",
                Fault::PowerOff {
                    node: NodeName {
                        role: Role::Object,
                        index: 0,
                    },
                    at: after(100.0),
                },
            ),
        ];
        for (spec, expected) in table {
            let fault: Fault = spec.parse().unwrap();
            assert_eq!(fault, expected);
            assert_eq!(fault.to_string(), spec);
            fault.validate(&SHAPE).unwrap();
        }
    }

    #[test]
    fn a_mistake_is_named_with_an_example_of_its_kind() {
        let table = [
            ("", "", "kill:meta1@40%"),
            ("explode:meta1@40%", "explode", "kill:meta1@40%"),
            ("kill:meta1", "meta1", "kill:meta1@40%"),
            ("kill:meta@40%", "meta", "kill:meta1@40%"),
            ("kill:mate1@40%", "mate1", "kill:meta1@40%"),
            (
                "kill:meta99999999999@40%",
                "meta99999999999",
                "kill:meta1@40%",
            ),
            ("kill:meta1@40", "40", "kill:meta1@40%"),
            ("kill:meta1@140%", "140%", "kill:meta1@40%"),
            ("kill:meta1@-1%", "-1%", "kill:meta1@40%"),
            ("kill:meta1@nan%", "nan%", "kill:meta1@40%"),
            ("kill:meta1@1e1%", "1e1%", "kill:meta1@40%"),
            ("kill:meta1@4%+", "", "kill:meta1@40%"),
            ("kill:meta1@4%+1s", "1s", "kill:meta1@40%"),
            ("kill:meta1@4+9%", "9%", "kill:meta1@40%"),
            ("pause:client0@20%", "client0@20%", "pause:client0@20%:5000"),
            ("pause:client0@20%:", "", "pause:client0@20%:5000"),
            ("pause:client0@20%:5s", "5s", "pause:client0@20%:5000"),
            ("pause:client0@20%:0", "0", "pause:client0@20%:5000"),
            (
                "partition:proxy0@5%:9",
                "proxy0",
                "partition:proxy0,meta1@50%:5000",
            ),
            (
                "partition:meta1,meta1@5%:9",
                "meta1,meta1",
                "partition:proxy0,meta1@50%:5000",
            ),
            ("loss:100", "100", "loss:10"),
            ("loss:ten", "ten", "loss:10"),
            ("poweroff:object0", "object0", "poweroff:object0@60%"),
        ];
        for (spec, part, example) in table {
            let error = spec.parse::<Fault>().unwrap_err();
            assert_eq!(error.part, part, "{error}");
            assert_eq!(error.example, example, "{error}");
            assert!(error.to_string().contains(&format!("fault '{spec}'")));
        }
    }

    #[test]
    fn a_fault_must_fit_the_cluster() {
        let one_client = Shape { client: 1, ..SHAPE };
        let table = [
            ("kill:meta2@40%", SHAPE, "meta2", "meta0 to meta1"),
            ("kill:root1@40%", SHAPE, "root", "the cluster has one root"),
            ("kill:client1@1%", one_client, "client1", "client0"),
            ("kill:meta0@40%!", SHAPE, "!", "can never finish"),
            ("kill:root@40%!", SHAPE, "!", "can never finish"),
            ("kill:client0@40%!", one_client, "!", "the only client"),
            ("partition:proxy0,object7@1%:5", SHAPE, "object7", "object1"),
            ("poweroff:proxy0@40%", SHAPE, "proxy0", "nothing on disk"),
        ];
        for (spec, shape, part, reason) in table {
            let fault: Fault = spec.parse().unwrap();
            let error = fault.validate(&shape).unwrap_err();
            assert_eq!(error.part, part, "{error}");
            assert!(error.reason.contains(reason), "{error}");
        }
    }

    fn node() -> impl Strategy<Value = NodeName> {
        let role = prop_oneof![
            Just(Role::Meta),
            Just(Role::Object),
            Just(Role::Proxy),
            Just(Role::Client),
            Just(Role::Router)
        ];
        prop_oneof![
            Just(NodeName {
                role: Role::Root,
                index: 0
            }),
            (role, any::<u32>()).prop_map(|(role, index)| NodeName { role, index })
        ]
    }

    fn fault() -> impl Strategy<Value = Fault> {
        let at = || {
            let delay = prop_oneof![Just(0), 1..=DURATION_MS_MAX];
            (0.0..=100.0, delay).prop_map(|(percent, delay_ms)| Moment { percent, delay_ms })
        };
        let ms = || 1..=DURATION_MS_MAX;
        prop_oneof![
            (node(), at(), any::<bool>()).prop_map(|(node, at, restart)| Fault::Kill {
                node,
                at,
                restart
            }),
            (node(), at(), ms()).prop_map(|(node, at, duration_ms)| Fault::Pause {
                node,
                at,
                duration_ms
            }),
            (node(), node(), at(), ms())
                .prop_filter("two nodes", |(a, b, ..)| a != b)
                .prop_map(|(a, b, at, duration_ms)| Fault::Partition {
                    a,
                    b,
                    at,
                    duration_ms
                }),
            (0.0..100.0).prop_map(|percent| Fault::Loss { percent }),
            (node(), at()).prop_map(|(node, at)| Fault::PowerOff { node, at }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_printed_is_parsed_back(fault in fault()) {
            prop_assert_eq!(fault.to_string().parse::<Fault>().unwrap(), fault);
        }

        #[test]
        fn any_text_is_either_a_fault_or_an_error(
            spec in "(kill|pause|partition|loss|poweroff|.{0,4}):?(root|meta|proxy)?[0-9@%,:!.+é]{0,12}"
        ) {
            if let Ok(fault) = spec.parse::<Fault>() {
                prop_assert_eq!(fault.to_string().parse::<Fault>().unwrap(), fault);
            }
        }
    }
}
