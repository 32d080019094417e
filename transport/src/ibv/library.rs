//! libibverbs, loaded when it is first asked for.
//!
//! Owns: the table of the functions that the library exports, each with the version of its symbol:
//! an old one with another ABI stands beside most of them. The library is never unloaded: its
//! providers keep threads and file descriptors.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;

use super::ffi;

/// Why there is no libibverbs to work with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoLibrary {
    /// It is not installed; the loader's words.
    NotInstalled(String),
    /// It lacks this function: too old.
    TooOld(&'static str),
}

impl fmt::Display for NoLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoLibrary::NotInstalled(why) => {
                write!(
                    f,
                    "libibverbs is not installed (Debian: libibverbs1): {why}"
                )
            }
            NoLibrary::TooOld(symbol) => write!(f, "libibverbs is too old: it has no {symbol}"),
        }
    }
}

impl std::error::Error for NoLibrary {}

const FILE: &CStr = c"libibverbs.so.1";

macro_rules! functions {
    (required {
        $($name:ident = $symbol:literal $version:literal
          ($($argument:ty),*) -> $result:ty;)*
    }
    optional {
        $($may:ident = $may_symbol:literal $may_version:literal
          ($($may_argument:ty),*) -> $may_result:ty;)*
    }) => {
        /// What the library exports.
        pub struct Library {
            $(pub $name: unsafe extern "C" fn($($argument),*) -> $result,)*
            $(pub $may: Option<unsafe extern "C" fn($($may_argument),*) -> $may_result>,)*
        }

        impl Library {
            fn load(file: &CStr) -> Result<Library, NoLibrary> {
                let handle = open(file)?;
                Ok(Library {
                    $($name: {
                        let symbol = find(handle, $symbol, $version)
                            .ok_or(NoLibrary::TooOld(stringify!($name)))?;
                        // SAFETY: the symbol of this name and version is this function: the ABI
                        // that libibverbs promises for the version.
                        unsafe {
                            std::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($argument),*) -> $result,
                            >(symbol)
                        }
                    },)*
                    $($may: find(handle, $may_symbol, $may_version).map(|symbol| {
                        // SAFETY: as above.
                        unsafe {
                            std::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($may_argument),*) -> $may_result,
                            >(symbol)
                        }
                    }),)*
                })
            }
        }
    };
}

functions! {
    required {
        get_device_list = c"ibv_get_device_list" c"IBVERBS_1.1"
            (*mut c_int) -> *mut *mut ffi::Device;
        free_device_list = c"ibv_free_device_list" c"IBVERBS_1.1" (*mut *mut ffi::Device) -> ();
        get_device_name = c"ibv_get_device_name" c"IBVERBS_1.1" (*mut ffi::Device) -> *const c_char;
        open_device = c"ibv_open_device" c"IBVERBS_1.1" (*mut ffi::Device) -> *mut ffi::Context;
        close_device = c"ibv_close_device" c"IBVERBS_1.1" (*mut ffi::Context) -> c_int;
        query_device = c"ibv_query_device" c"IBVERBS_1.1"
            (*mut ffi::Context, *mut ffi::DeviceAttr) -> c_int;
        query_port = c"ibv_query_port" c"IBVERBS_1.1"
            (*mut ffi::Context, u8, *mut ffi::PortAttr) -> c_int;
        query_gid = c"ibv_query_gid" c"IBVERBS_1.1"
            (*mut ffi::Context, u8, c_int, *mut ffi::Gid) -> c_int;
        alloc_pd = c"ibv_alloc_pd" c"IBVERBS_1.1" (*mut ffi::Context) -> *mut ffi::Pd;
        dealloc_pd = c"ibv_dealloc_pd" c"IBVERBS_1.1" (*mut ffi::Pd) -> c_int;
        reg_mr = c"ibv_reg_mr" c"IBVERBS_1.1"
            (*mut ffi::Pd, *mut c_void, usize, c_int) -> *mut ffi::Mr;
        dereg_mr = c"ibv_dereg_mr" c"IBVERBS_1.1" (*mut ffi::Mr) -> c_int;
        create_comp_channel = c"ibv_create_comp_channel" c"IBVERBS_1.0"
            (*mut ffi::Context) -> *mut ffi::CompChannel;
        destroy_comp_channel = c"ibv_destroy_comp_channel" c"IBVERBS_1.0"
            (*mut ffi::CompChannel) -> c_int;
        create_cq = c"ibv_create_cq" c"IBVERBS_1.1"
            (*mut ffi::Context, c_int, *mut c_void, *mut ffi::CompChannel, c_int) -> *mut ffi::Cq;
        resize_cq = c"ibv_resize_cq" c"IBVERBS_1.1" (*mut ffi::Cq, c_int) -> c_int;
        destroy_cq = c"ibv_destroy_cq" c"IBVERBS_1.1" (*mut ffi::Cq) -> c_int;
        get_cq_event = c"ibv_get_cq_event" c"IBVERBS_1.1"
            (*mut ffi::CompChannel, *mut *mut ffi::Cq, *mut *mut c_void) -> c_int;
        ack_cq_events = c"ibv_ack_cq_events" c"IBVERBS_1.1" (*mut ffi::Cq, c_uint) -> ();
        create_srq = c"ibv_create_srq" c"IBVERBS_1.1"
            (*mut ffi::Pd, *mut ffi::SrqInitAttr) -> *mut ffi::Srq;
        modify_srq = c"ibv_modify_srq" c"IBVERBS_1.1"
            (*mut ffi::Srq, *mut ffi::SrqAttr, c_int) -> c_int;
        query_srq = c"ibv_query_srq" c"IBVERBS_1.1" (*mut ffi::Srq, *mut ffi::SrqAttr) -> c_int;
        destroy_srq = c"ibv_destroy_srq" c"IBVERBS_1.1" (*mut ffi::Srq) -> c_int;
        create_qp = c"ibv_create_qp" c"IBVERBS_1.1"
            (*mut ffi::Pd, *mut ffi::QpInitAttr) -> *mut ffi::Qp;
        modify_qp = c"ibv_modify_qp" c"IBVERBS_1.1"
            (*mut ffi::Qp, *mut ffi::QpAttr, c_int) -> c_int;
        query_qp = c"ibv_query_qp" c"IBVERBS_1.1"
            (*mut ffi::Qp, *mut ffi::QpAttr, c_int, *mut ffi::QpInitAttr) -> c_int;
        destroy_qp = c"ibv_destroy_qp" c"IBVERBS_1.1" (*mut ffi::Qp) -> c_int;
        create_ah = c"ibv_create_ah" c"IBVERBS_1.1"
            (*mut ffi::Pd, *mut ffi::AhAttr) -> *mut ffi::Ah;
        destroy_ah = c"ibv_destroy_ah" c"IBVERBS_1.1" (*mut ffi::Ah) -> c_int;
        attach_mcast = c"ibv_attach_mcast" c"IBVERBS_1.1"
            (*mut ffi::Qp, *const ffi::Gid, u16) -> c_int;
        detach_mcast = c"ibv_detach_mcast" c"IBVERBS_1.1"
            (*mut ffi::Qp, *const ffi::Gid, u16) -> c_int;
        get_async_event = c"ibv_get_async_event" c"IBVERBS_1.1"
            (*mut ffi::Context, *mut ffi::AsyncEvent) -> c_int;
        ack_async_event = c"ibv_ack_async_event" c"IBVERBS_1.1" (*mut ffi::AsyncEvent) -> ();
    }
    optional {
        reg_mr_iova2 = c"ibv_reg_mr_iova2" c"IBVERBS_1.8"
            (*mut ffi::Pd, *mut c_void, usize, u64, c_uint) -> *mut ffi::Mr;
        qp_to_qp_ex = c"ibv_qp_to_qp_ex" c"IBVERBS_1.6" (*mut ffi::Qp) -> *mut ffi::QpEx;
        query_gid_table = c"_ibv_query_gid_table" c"IBVERBS_1.11"
            (*mut ffi::Context, *mut ffi::GidEntry, usize, u32, usize) -> isize;
    }
}

/// The library of this process; loaded by the first caller.
pub fn library() -> Result<&'static Library, NoLibrary> {
    static LIBRARY: OnceLock<Result<Library, NoLibrary>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| Library::load(FILE))
        .as_ref()
        .map_err(NoLibrary::clone)
}

fn open(file: &CStr) -> Result<*mut c_void, NoLibrary> {
    // SAFETY: a name that ends in zero; the library's constructors are libibverbs' own.
    let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return Err(NoLibrary::NotInstalled(loader_error()));
    }
    Ok(handle)
}

/// What the loader says about its last failure on this thread.
fn loader_error() -> String {
    // SAFETY: no arguments; the text is the loader's until this thread calls it again.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "the loader gives no reason".to_owned();
    }
    // SAFETY: not null, and a C string.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().into_owned()
}

#[cfg(target_env = "gnu")]
fn find(handle: *mut c_void, symbol: &CStr, version: &CStr) -> Option<*mut c_void> {
    // SAFETY: the handle is an open library's, which is never closed; the names end in zero.
    let address = unsafe { libc::dlvsym(handle, symbol.as_ptr(), version.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// Other C libraries know no versions; where they load it at all, the newest is meant.
#[cfg(not(target_env = "gnu"))]
fn find(handle: *mut c_void, symbol: &CStr, _version: &CStr) -> Option<*mut c_void> {
    // SAFETY: the handle is an open library's, which is never closed; the name ends in zero.
    let address = unsafe { libc::dlsym(handle, symbol.as_ptr()) };
    (!address.is_null()).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_or_is_another_is_an_error() {
        let absent = Library::load(c"libibverbs-absent.so.1").err().unwrap();
        assert!(matches!(absent, NoLibrary::NotInstalled(_)));
        assert!(absent.to_string().contains("libibverbs1"));
        let other = Library::load(c"libc.so.6").err().unwrap();
        assert_eq!(other, NoLibrary::TooOld("get_device_list"));
    }
}
