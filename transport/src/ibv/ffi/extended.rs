//! libibverbs' extended calls: what a device can do in flags of 64 bits, queue pairs that are told
//! beforehand which operations they will carry, and the functions by which those are posted.
//!
//! They are in a table in front of the context, which grows at its front; so a place in it is counted
//! from the context, and the table's own size says which calls it has.

use std::ffi::{c_int, c_uint, c_void};
use std::mem::{offset_of, size_of};

use super::{Context, Cq, DeviceAttr, Pd, Qp, QpCap, Srq};

/// What [`Context::abi_compat`] is if the table is there.
const IS_EXTENDED: usize = usize::MAX;

type QueryDeviceEx =
    unsafe extern "C" fn(*mut Context, *const c_void, *mut DeviceAttrEx, usize) -> c_int;
type CreateQpEx = unsafe extern "C" fn(*mut Context, *mut QpInitAttrEx) -> *mut Qp;

/// The end of the table, from the first call that is used here.
#[repr(C)]
struct Table {
    query_device_ex: Option<QueryDeviceEx>,
    _flows_and_shared: [*mut c_void; 5],
    create_qp_ex: Option<CreateQpEx>,
    _receives_and_xrc: [*mut c_void; 4],
    /// A word that libibverbs keeps for later.
    _reserved: u64,
    /// Bytes of the whole table, the context among them.
    sz: usize,
    context: Context,
}

/// The device's `ibv_query_device_ex`, if it has one.
///
/// # Safety
/// The context is open.
pub unsafe fn query_device_ex_of(context: *mut Context) -> Option<QueryDeviceEx> {
    // SAFETY: the caller's.
    let table = unsafe { table_with(context, offset_of!(Table, query_device_ex)) }?;
    // SAFETY: the table has the field.
    unsafe { (*table).query_device_ex }
}

/// The device's `ibv_create_qp_ex`, if it has one.
///
/// # Safety
/// The context is open.
pub unsafe fn create_qp_ex_of(context: *mut Context) -> Option<CreateQpEx> {
    // SAFETY: the caller's.
    let table = unsafe { table_with(context, offset_of!(Table, create_qp_ex)) }?;
    // SAFETY: the table has the field.
    unsafe { (*table).create_qp_ex }
}

/// The table, if it is there and has a field at `offset`.
///
/// # Safety
/// The context is open.
unsafe fn table_with(context: *mut Context, offset: usize) -> Option<*const Table> {
    // SAFETY: an open context has this field in every version.
    if unsafe { (*context).abi_compat }.addr() != IS_EXTENDED {
        return None;
    }
    let table = context.wrapping_byte_sub(offset_of!(Table, context));
    let table = table.cast_const().cast::<Table>();
    // SAFETY: what is marked so has the table's size right in front of it.
    let size = unsafe { (&raw const (*table).sz).read() };
    (size >= size_of::<Table>() - offset).then_some(table)
}

/// The beginning of what `ibv_query_device_ex` fills, and room for the rest.
#[repr(C)]
pub struct DeviceAttrEx {
    pub orig: DeviceAttr,
    pub comp_mask: u32,
    _paging: [u64; 3],
    _timestamps: [u64; 2],
    pub device_cap_flags_ex: u64,
    _rest: [u64; 14],
}

/// Of `device_cap_flags_ex`: ATOMIC WRITE, and FLUSH for visibility.
pub const ATOMIC_WRITE_DEVICE: u64 = 1 << 40;
pub const FLUSH_DEVICE: u64 = 1 << 38;

#[repr(C)]
pub struct QpInitAttrEx {
    pub qp_context: *mut c_void,
    pub send_cq: *mut Cq,
    pub recv_cq: *mut Cq,
    pub srq: *mut Srq,
    pub cap: QpCap,
    pub qp_type: c_uint,
    pub sq_sig_all: c_int,
    /// Which of the fields below are there.
    pub comp_mask: u32,
    pub pd: *mut Pd,
    pub xrcd: *mut c_void,
    pub create_flags: u32,
    pub max_tso_header: u16,
    pub rwq_ind_tbl: *mut c_void,
    pub rx_hash_conf: [u64; 3],
    pub source_qpn: u32,
    pub send_ops_flags: u64,
}

pub const INIT_ATTR_PD: u32 = 1;
pub const INIT_ATTR_SEND_OPS: u32 = 1 << 6;
/// Of `send_ops_flags`.
pub const WITH_FLUSH: u64 = 1 << 11;
pub const WITH_ATOMIC_WRITE: u64 = 1 << 12;

#[repr(C)]
struct WholeQp {
    qp: Qp,
    mutex: libc::pthread_mutex_t,
    cond: libc::pthread_cond_t,
    events_completed: u32,
}

/// A queue pair that was made with `send_ops_flags`. Libraries that do not know a function do not have
/// its place either: it is there only if its flag was granted.
#[repr(C)]
pub struct QpEx {
    base: WholeQp,
    comp_mask: u64,
    /// Of the next request.
    pub wr_id: u64,
    pub wr_flags: c_uint,
    /// The operations that `post_send` of the context has, too, and what sets their arguments.
    _posted_otherwise: [*mut c_void; 17],
    pub wr_start: Option<unsafe extern "C" fn(*mut QpEx)>,
    pub wr_complete: Option<unsafe extern "C" fn(*mut QpEx) -> c_int>,
    pub wr_abort: Option<unsafe extern "C" fn(*mut QpEx)>,
    pub wr_atomic_write: Option<unsafe extern "C" fn(*mut QpEx, u32, u64, *const c_void)>,
    pub wr_flush: Option<unsafe extern "C" fn(*mut QpEx, u32, u64, usize, u8, u8)>,
}

/// Types of a FLUSH, as bits, and its levels.
pub const FLUSH_GLOBAL: u8 = 1;
pub const FLUSH_PERSISTENT: u8 = 1 << 1;
pub const FLUSH_RANGE: u8 = 0;
pub const FLUSH_REGION: u8 = 1;

// Of 64-bit Linux.
const _: () = {
    assert!(size_of::<DeviceAttrEx>() == 400);
    assert!(offset_of!(DeviceAttrEx, device_cap_flags_ex) == 280);
    assert!(size_of::<QpInitAttrEx>() == 136);
    assert!(offset_of!(QpInitAttrEx, send_ops_flags) == 128);
};

// A mutex is longer on others.
#[cfg(target_arch = "x86_64")]
const _: () = {
    assert!(size_of::<Context>() == 328);
    assert!(offset_of!(QpEx, wr_start) == 320);
    assert!(offset_of!(QpEx, wr_atomic_write) == 344);
    assert!(size_of::<QpEx>() == 360);
};

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;
    use std::ptr::{null_mut, without_provenance_mut};

    use super::*;

    unsafe extern "C" fn create(_: *mut Context, _: *mut QpInitAttrEx) -> *mut Qp {
        null_mut()
    }

    /// A table as a library would make it, its size that of one with everything from `offset` on.
    fn table(offset: usize, is_extended: bool) -> Box<MaybeUninit<Table>> {
        let mut table = Box::new(MaybeUninit::<Table>::zeroed());
        // SAFETY: zero is a value of each of its fields.
        let fields = unsafe { table.assume_init_mut() };
        fields.create_qp_ex = Some(create);
        fields.sz = size_of::<Table>() - offset;
        if is_extended {
            fields.context.abi_compat = without_provenance_mut(IS_EXTENDED);
        }
        table
    }

    #[test]
    fn a_call_is_found_only_in_a_table_that_is_there_and_long_enough() {
        for (from, is_extended, has_query, has_create) in [
            (0, true, false, true),
            (offset_of!(Table, create_qp_ex), true, false, true),
            (offset_of!(Table, create_qp_ex) + 8, true, false, false),
            (0, false, false, false),
        ] {
            let mut table = table(from, is_extended);
            // SAFETY: inside the table.
            let context = unsafe { &raw mut (*table.as_mut_ptr()).context };
            // SAFETY: as an open context is.
            let found = unsafe { (query_device_ex_of(context), create_qp_ex_of(context)) };
            assert_eq!(
                (found.0.is_some(), found.1.is_some()),
                (has_query, has_create)
            );
        }
    }
}

#[cfg(all(test, feature = "abi-oracle"))]
mod oracle {
    use super::*;

    #[test]
    fn the_extended_layout_is_that_of_the_headers() {
        use rdma_sys::{ibv_device_attr_ex, ibv_qp_ex, ibv_qp_init_attr_ex, verbs_context};
        let end = |offset| size_of::<verbs_context>() - offset;
        let ours = |offset| size_of::<Table>() - offset;
        for (here, there) in [
            (
                ours(offset_of!(Table, context)),
                end(offset_of!(verbs_context, context)),
            ),
            (
                ours(offset_of!(Table, sz)),
                end(offset_of!(verbs_context, sz)),
            ),
            (
                ours(offset_of!(Table, create_qp_ex)),
                end(offset_of!(verbs_context, create_qp_ex)),
            ),
            (
                ours(offset_of!(Table, query_device_ex)),
                end(offset_of!(verbs_context, query_device_ex)),
            ),
            (
                offset_of!(DeviceAttrEx, device_cap_flags_ex),
                offset_of!(ibv_device_attr_ex, device_cap_flags_ex),
            ),
            (size_of::<DeviceAttrEx>(), size_of::<ibv_device_attr_ex>()),
            (
                offset_of!(QpInitAttrEx, comp_mask),
                offset_of!(ibv_qp_init_attr_ex, comp_mask),
            ),
            (
                offset_of!(QpInitAttrEx, pd),
                offset_of!(ibv_qp_init_attr_ex, pd),
            ),
            (
                offset_of!(QpInitAttrEx, send_ops_flags),
                offset_of!(ibv_qp_init_attr_ex, send_ops_flags),
            ),
            (size_of::<QpInitAttrEx>(), size_of::<ibv_qp_init_attr_ex>()),
            (offset_of!(QpEx, wr_id), offset_of!(ibv_qp_ex, wr_id)),
            (offset_of!(QpEx, wr_flags), offset_of!(ibv_qp_ex, wr_flags)),
            (offset_of!(QpEx, wr_start), offset_of!(ibv_qp_ex, wr_start)),
            (
                offset_of!(QpEx, wr_complete),
                offset_of!(ibv_qp_ex, wr_complete),
            ),
            (offset_of!(QpEx, wr_abort), offset_of!(ibv_qp_ex, wr_abort)),
        ] {
            assert_eq!(here, there);
        }
        // rdma-core 44 ends with ATOMIC WRITE, later ones with FLUSH.
        assert!(size_of::<ibv_qp_ex>() >= offset_of!(QpEx, wr_flush));
        assert_eq!(INIT_ATTR_SEND_OPS, 64);
    }
}
