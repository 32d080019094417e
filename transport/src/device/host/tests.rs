//! Two devices on one host, driven by hand.

use std::sync::Arc;

use lowtide_transport_proto::qp::{
    Access as Rights, InitAttr, QpCaps, Rkey, RtrAttr, RtsAttr, SgList, Sge, Status, WrId,
};
use lowtide_transport_proto::wire::{Mtu, PKEY_DEFAULT, Psn, RnrTimer};

use super::super::{Peers, QpId};
use super::*;
use crate::memory::SharedMemory;
use crate::names::Random;

const DOMAIN: u32 = 1;
const LEN: usize = 3 * COPY_MAX;

struct Side {
    device: Device,
    id: QpId,
    key: Key,
    memory: Arc<SharedMemory>,
    batch: HostBatch,
}

impl Side {
    fn new() -> Side {
        let options = DeviceOptions {
            same_host: SameHost::Direct,
            ..DeviceOptions::default()
        };
        let random = Random::default;
        let mut device =
            Device::bind(([127, 0, 0, 1], 0).into(), &options, Peers::Any, random).unwrap();
        let caps = QpCaps {
            send_wr_max: 4,
            recv_wr_max: 4,
            shared_receives: false,
        };
        let (id, _) = device.create_qp(DOMAIN, caps).unwrap();
        let memory = device.memory.new_shared(LEN).unwrap();
        let shared = memory.clone();
        let key = device.memory.register_shared(DOMAIN, shared, Access::ALL);
        Side {
            device,
            id,
            key: key.unwrap(),
            memory,
            batch: HostBatch::default(),
        }
    }

    fn connect(&mut self, to: &Side) {
        let dest = to.device.slots[to.id.0 as usize].qpn;
        let qp = self.device.qp(self.id).unwrap();
        let (access, pkey) = (Rights::ALL, PKEY_DEFAULT);
        qp.to_init(InitAttr { access, pkey }).unwrap();
        qp.to_rtr(RtrAttr {
            dest,
            path_mtu: Mtu::B4096,
            rq_psn: Psn::new(7),
            max_dest_rd_atomic: 16,
            min_rnr_timer: RnrTimer::new(1),
        })
        .unwrap();
        qp.to_rts(RtsAttr {
            sq_psn: Psn::new(7),
            timeout: 10,
            retry_cnt: 7,
            rnr_retry: 7,
            max_rd_atomic: 16,
            read_chunk_packets: 16,
        })
        .unwrap();
        self.device
            .set_peer(self.id, to.device.local_addr(), Some(RING_PACKETS));
    }

    /// What whoever drives a device does.
    fn drive(&mut self) {
        let now = self.device.now();
        self.device.attend();
        self.device.receive_host(&mut self.batch);
        for (source, bytes) in self.batch.packets() {
            let input = self.device.handle_host(now, source, bytes);
            if let Some(id) = input.queue_pair() {
                while let Some((_, datagram)) = self.device.handle_kept(now, id) {
                    self.device.give_back(datagram);
                }
            }
        }
        self.device.bury();
        while self.device.expire(now).is_some() {}
        self.device.transmit(now);
    }

    fn write(&mut self, id: u64, to: &Side, len: usize) {
        let local = Sge {
            addr: 0,
            len: len as u32,
            lkey: Lkey(self.key.0),
        };
        let remote = Remote {
            va: 0,
            rkey: Rkey(to.key.0),
        };
        let wr = qp::SendWr::new(
            WrId(id),
            SendOp::Write(remote),
            SgList::new(&[local]).unwrap(),
        );
        self.device.qp(self.id).unwrap().post_send(wr).unwrap();
    }

    fn completion(&mut self) -> Option<(WrId, Status)> {
        let done = self.device.poll_completion(self.id)?;
        Some((done.wr_id, done.status))
    }
}

/// A request that has been carried out in part and then has to go as packets leaves nothing behind:
/// the next one is carried out from its first byte on.
#[test]
fn what_was_copied_of_one_request_is_not_missing_from_the_next() {
    let (mut a, mut b) = (Side::new(), Side::new());
    a.connect(&b);
    b.connect(&a);
    for _ in 0..3 {
        a.drive();
        b.drive();
    }
    let there = b.device.local_addr();
    a.memory.write(0, &[1; LEN]);
    a.write(1, &b, LEN);
    a.device.transmit(a.device.now());
    let mut first = [0; 1];
    b.memory.read(COPY_MAX - 1, &mut first);
    assert_eq!((first, a.completion()), ([1], None), "one part of three");
    // In the next turn there is no way.
    a.device.set_blocked(there, true);
    a.device.transmit(a.device.now());
    a.device.set_blocked(there, false);
    let mut done = None;
    while done.is_none() {
        a.drive();
        b.drive();
        done = a.completion();
    }
    assert_eq!(done, Some((WrId(1), Status::Success)));

    let before = a.device.counters().host_direct;
    a.memory.write(0, &[2; LEN]);
    a.write(2, &b, LEN - 5);
    while done != Some((WrId(2), Status::Success)) {
        a.drive();
        done = a.completion();
    }
    assert_eq!(a.device.counters().host_direct, before + 1);
    let mut all = vec![0; LEN];
    b.memory.read(0, &mut all);
    let (new, old) = all.split_at(LEN - 5);
    assert!(new.iter().all(|byte| *byte == 2) && old == [1; 5]);
}
