//! Management datagrams: what goes to queue pair 1.

use std::fmt::Write as _;

use lowtide_transport_proto::cm::{self, Message};
use serde_json::{Value, json};

const CLASS_CM: u8 = 7;

/// Tells what a datagram says, as data and in words.
pub(super) fn explain(mad: &[u8], words: &mut String) -> Value {
    let Some(head) = mad.first_chunk::<24>() else {
        words.push_str("  MAD too short");
        return json!({ "error": "too short" });
    };
    let class = class_name(head[1]);
    let method = method_name(head[3]);
    let tid = u64::from_be_bytes(head[8..16].try_into().expect("eight bytes"));
    let attribute = u16::from_be_bytes([head[16], head[17]]);
    let name = match (head[1], cm_attribute(attribute)) {
        (CLASS_CM, Some(name)) => name.to_owned(),
        _ => format!("attribute {attribute:#06x}"),
    };
    let _ = write!(words, "  {class} {name} tid {tid:#x}");
    let mut value = json!({
        "class": class, "method": method, "attribute": name, "tid": tid,
    });
    if head[1] == CLASS_CM
        && let Some(details) = details(mad, words)
    {
        value["fields"] = details;
    }
    value
}

/// The fields that tell connections apart and why they end.
fn details(mad: &[u8], words: &mut String) -> Option<Value> {
    let (_, message) = match Message::decode(mad) {
        Ok(decoded) => decoded,
        Err(error) => return Some(json!({ "error": format!("{error:?}") })),
    };
    if let Message::Req(req) = message {
        let _ = write!(
            words,
            " local {:#x} service {:#x} qp {:#x} psn {} mtu {}",
            req.local.0,
            req.service.0,
            req.qpn.value(),
            req.psn.value(),
            req.mtu.bytes()
        );
        return Some(json!({
            "local": req.local.0, "service": req.service.0, "qpn": req.qpn.value(),
            "psn": req.psn.value(), "mtu": req.mtu.bytes(),
            "source": cm::address(req.local_gid), "target": cm::address(req.remote_gid),
            "retry_count": req.retry_count, "rnr_retry": req.rnr_retry,
            "ack_timeout": req.ack_timeout,
        }));
    }
    if let Message::Rep(rep) = message {
        let (local, remote) = (rep.local.0, rep.remote.0);
        let (qpn, psn) = (rep.qpn.value(), rep.psn.value());
        let _ = write!(
            words,
            " local {local:#x} remote {remote:#x} qp {qpn:#x} psn {psn}"
        );
        return Some(json!({ "local": local, "remote": remote, "qpn": qpn, "psn": psn }));
    }
    if let Message::Rej(rej) = message {
        let (local, remote) = (rej.local.0, rej.remote.0);
        let _ = write!(
            words,
            " local {local:#x} remote {remote:#x} reason {}",
            rej.reason
        );
        return Some(json!({ "local": local, "remote": remote, "reason": rej.reason }));
    }
    // The others begin with the two communication ids.
    let id = |at: usize| u32::from_be_bytes(mad[at..at + 4].try_into().expect("four bytes"));
    let (local, remote) = (id(24), id(28));
    let _ = write!(words, " local {local:#x} remote {remote:#x}");
    Some(json!({ "local": local, "remote": remote }))
}

fn class_name(class: u8) -> String {
    match class {
        0x01 | 0x81 => "SM".to_owned(),
        0x03 => "SA".to_owned(),
        0x04 => "PM".to_owned(),
        0x06 => "DM".to_owned(),
        CLASS_CM => "CM".to_owned(),
        other => format!("class {other:#04x}"),
    }
}

fn method_name(method: u8) -> String {
    match method {
        0x01 => "Get".to_owned(),
        0x02 => "Set".to_owned(),
        0x03 => "Send".to_owned(),
        0x05 => "Trap".to_owned(),
        0x06 => "Report".to_owned(),
        0x81 => "GetResp".to_owned(),
        other => format!("{other:#04x}"),
    }
}

fn cm_attribute(attribute: u16) -> Option<&'static str> {
    Some(match attribute {
        0x0001 => "ClassPortInfo",
        0x0010 => "ConnectRequest",
        0x0011 => "MsgRcptAck",
        0x0012 => "ConnectReject",
        0x0013 => "ConnectReply",
        0x0014 => "ReadyToUse",
        0x0015 => "DisconnectRequest",
        0x0016 => "DisconnectReply",
        0x0017 => "ServiceIDResReq",
        0x0018 => "ServiceIDResResp",
        0x0019 => "LoadAlternatePath",
        0x001A => "AlternatePathResponse",
        _ => return None,
    })
}
