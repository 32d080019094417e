//! What a device counts.

use lowtide_transport_proto::qp;

/// What the device has seen. What Linux rxe counts too has rxe's name (`hw_counters` of a port in sysfs),
/// and counts the same: `ci/guest/run counters` compares the names, and says why some are missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation of a counter")]
#[non_exhaustive]
pub struct Counters {
    /// Datagrams sent.
    pub sent_pkts: u64,
    pub tx_bytes: u64,
    /// Datagrams received, whatever they were.
    pub rx_datagrams: u64,
    /// Those of them that were packets with a right ICRC.
    pub rcvd_pkts: u64,
    pub rx_bytes: u64,
    /// Sends that carried several datagrams.
    pub gso_sends: u64,
    /// Receives that carried several datagrams.
    pub gro_receives: u64,
    /// Datagrams the kernel refused to send.
    pub send_err: u64,
    /// Datagrams our own socket dropped for want of buffer.
    pub rx_overflow: u64,
    pub rx_malformed: u64,
    pub rx_bad_icrc: u64,
    /// An ICRC that is right for an Identification which the sender would not have used.
    pub rx_odd_identification: u64,
    pub rx_unknown_qp: u64,
    /// Right queue pair, wrong source.
    pub rx_wrong_peer: u64,
    /// Lost on purpose on their way out.
    pub faults_dropped: u64,
    /// Dropped because the peer is cut off on purpose, both ways.
    pub faults_blocked: u64,
    pub duplicate_request: u64,
    pub out_of_seq_request: u64,
    pub rcvd_seq_err: u64,
    pub rcvd_rnr_err: u64,
    pub send_rnr_err: u64,
    /// Requests that failed because the peer was silent, or had no receive, for all retries.
    pub retry_exceeded_err: u64,
    pub retry_rnr_exceeded_err: u64,
    /// Returns to the oldest packet that is not acknowledged, RNR NAKs excepted.
    pub completer_retry_err: u64,
    /// SENDs finished, and receives.
    pub rdma_sends: u64,
    pub rdma_recvs: u64,
    pub ack_timeout: u64,
    pub probes: u64,
    pub retransmitted_pkts: u64,
    /// Packets that a switch has marked congested, and notifications (CNP) sent and received for
    /// such; the names are those of adapters.
    pub np_ecn_marked_roce_packets: u64,
    pub np_cnp_sent: u64,
    pub rp_cnp_handled: u64,
    /// Packets a queue pair had no use for.
    pub dropped_pkts: u64,
    /// Messages handed up, and the urgent ones among them.
    pub messages: u64,
    pub urgent_messages: u64,
    /// Copies of whole messages made by us, for whatever reason.
    pub copies: u64,
    /// Bytes copied into registered memory to be sent in a parcel.
    pub sent_copied_bytes: u64,
    /// The same for messages that the peer fetches; none of those sent in pieces.
    pub bulk_copied_bytes: u64,
    /// Bytes put together from several packets.
    pub assembled_copied_bytes: u64,
    /// Bytes held back behind a message that was still being fetched.
    pub held_copied_bytes: u64,
    /// Bytes placed where they belong by READ: the one copy of a fetched message.
    pub bulk_placed_bytes: u64,
    /// Messages offered to be fetched, and messages fetched.
    pub bulk_offered: u64,
    pub bulk_fetched: u64,
    /// The most bytes that were lent, and being fetched, at once.
    pub lent_bytes_peak: u64,
    pub fetched_bytes_peak: u64,
    /// Packets sent and received through rings, and lost for want of room in one.
    pub host_tx_packets: u64,
    pub host_rx_packets: u64,
    pub host_lost_packets: u64,
    /// Requests carried out by ourselves in the memory of a peer on this host.
    pub host_direct: u64,
    /// Connections closed because the peer did what is not allowed.
    pub violations: u64,
}

impl Counters {
    /// Bytes of messages copied by us, so that they could be sent.
    #[must_use]
    pub fn bytes_copied_to_send(&self) -> u64 {
        self.sent_copied_bytes + self.bulk_copied_bytes
    }

    /// Bytes of messages copied by us on their way to the program: put together from packets, held
    /// back, or placed by READ.
    #[must_use]
    pub fn bytes_copied_on_receipt(&self) -> u64 {
        self.assembled_copied_bytes + self.held_copied_bytes + self.bulk_placed_bytes
    }
}

/// Adds what a queue pair has counted.
pub(super) fn add_counters(sum: &mut Counters, qp: &qp::Counters) {
    sum.duplicate_request += qp.duplicate_request;
    sum.out_of_seq_request += qp.out_of_seq_request;
    sum.rcvd_seq_err += qp.rcvd_seq_err;
    sum.rcvd_rnr_err += qp.rcvd_rnr_err;
    sum.send_rnr_err += qp.send_rnr_err;
    sum.retry_exceeded_err += qp.retry_exceeded_err;
    sum.retry_rnr_exceeded_err += qp.retry_rnr_exceeded_err;
    sum.completer_retry_err += qp.completer_retry_err;
    sum.rdma_sends += qp.rdma_sends;
    sum.rdma_recvs += qp.rdma_recvs;
    sum.ack_timeout += qp.ack_timeout;
    sum.probes += qp.probes;
    sum.retransmitted_pkts += qp.retransmitted_pkts;
    sum.dropped_pkts += qp.dropped_pkts;
    sum.rp_cnp_handled += qp.cnp_handled;
}
