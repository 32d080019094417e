//! Errors for C: an errno value as the result, and words for whoever asks.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use lowtide_transport::cm::ConnectError;
use lowtide_transport::raw::types::Error;

/// Why a call failed. Words are made of it only when somebody asks.
#[derive(Debug)]
pub(crate) enum Fault {
    Verbs(Error),
    Null(&'static str),
    Argument(&'static str),
    Again,
    Interrupted,
    Io(io::Error),
    Connect(ConnectError),
    /// A panic: a bug of ours.
    Bug(String),
}

impl Fault {
    fn errno(&self) -> c_int {
        match self {
            Fault::Verbs(error) => error.errno(),
            Fault::Connect(ConnectError::InUse) => libc::EBUSY,
            Fault::Null(_) | Fault::Argument(_) | Fault::Connect(_) => libc::EINVAL,
            Fault::Again => libc::EAGAIN,
            Fault::Interrupted => libc::EINTR,
            Fault::Io(error) => error.raw_os_error().unwrap_or(match error.kind() {
                io::ErrorKind::AddrInUse => libc::EADDRINUSE,
                io::ErrorKind::InvalidInput => libc::EINVAL,
                _ => libc::EIO,
            }),
            Fault::Bug(_) => libc::EIO,
        }
    }

    fn words(&self) -> String {
        match self {
            Fault::Verbs(error) => error.to_string(),
            Fault::Null(what) => format!("{what} is NULL or misaligned"),
            Fault::Argument(what) => (*what).to_owned(),
            Fault::Again => "nothing has come yet".to_owned(),
            Fault::Interrupted => "interrupted by a signal".to_owned(),
            Fault::Io(error) => error.to_string(),
            Fault::Connect(error) => error.to_string(),
            Fault::Bug(words) => format!("a bug in lowtide: {words}"),
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Verbs(error)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::Io(error)
    }
}

thread_local! {
    static LAST: RefCell<(Option<Fault>, CString)> = RefCell::default();
}

/// Carries a call out for C. The errno value of what fails.
pub(crate) fn run<T>(call: impl FnOnce() -> Result<T, Fault>) -> Result<T, c_int> {
    // Whatever a panic leaves behind is under locks that outlive panics.
    let done = catch_unwind(AssertUnwindSafe(call));
    done.unwrap_or_else(|panic| Err(Fault::Bug(words_of(panic.as_ref()))))
        .map_err(|fault| {
            let errno = fault.errno();
            // At the end of a thread its last words have gone already.
            let _ = LAST.try_with(|last| last.borrow_mut().0 = Some(fault));
            // SAFETY: the C library's own variable of this thread.
            unsafe { *libc::__errno_location() = errno };
            errno
        })
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(words), _) => (*words).to_owned(),
        (_, Some(words)) => words.clone(),
        _ => "it panicked".to_owned(),
    }
}

/// For functions that return 0 or an errno value.
pub(crate) fn code(call: impl FnOnce() -> Result<(), Fault>) -> c_int {
    run(call).err().unwrap_or(0)
}

/// For functions that return an object, or NULL and set errno.
pub(crate) fn object<T>(call: impl FnOnce() -> Result<Box<T>, Fault>) -> *mut T {
    run(call).map_or(std::ptr::null_mut(), Box::into_raw)
}

/// Why the last call of this thread that failed did, in words; "no error" if none has. Valid until
/// this thread's next call of this function.
#[unsafe(no_mangle)]
pub extern "C" fn lowtide_error_message() -> *const c_char {
    LAST.try_with(|last| {
        let (fault, text) = &mut *last.borrow_mut();
        let words = fault.as_ref().map_or("no error".to_owned(), Fault::words);
        // Names of files may hold anything but a zero.
        *text = CString::new(words.replace('\0', " ")).unwrap_or_default();
        text.as_ptr()
    })
    .unwrap_or(c"the thread has ended".as_ptr())
}

/// A completion's status in words; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn lowtide_wc_status_str(status: u32) -> *const c_char {
    let words: &CStr = match status {
        0 => c"success",
        1 => c"the message is longer than the receive",
        2 => c"the queue pair cannot do what was asked",
        4 => c"the request's memory is not registered as needed, or has gone",
        5 => c"flushed: the queue pair is in the error state",
        6 => c"the memory window cannot be bound so",
        7 => c"the peer's answer makes no sense",
        8 => c"memory of this side is not there, or not open to what came",
        9 => c"the peer found the request invalid",
        10 => c"the peer's memory is not open to this request",
        11 => c"the peer could not carry the request out",
        12 => c"the peer did not answer: no retries are left",
        13 => c"the peer had no receive posted: no retries are left",
        16 => c"the peer gave the request up",
        19 => c"the device has failed",
        20 => c"the answer did not come in time",
        21 => c"an error of another kind",
        _ => c"not a status",
    };
    words.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        // SAFETY: a string of C that lives until the next call.
        let words = unsafe { CStr::from_ptr(lowtide_error_message()) };
        words.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_an_errno_with_its_words() {
        assert_eq!(code(|| panic!("the {} broke", "sky")), libc::EIO);
        assert_eq!(message(), "a bug in lowtide: the sky broke");
        assert!(object::<u8>(|| panic!("again")).is_null());
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EIO));
        assert_eq!(code(|| std::panic::panic_any(7)), libc::EIO);
        assert_eq!(message(), "a bug in lowtide: it panicked");
        assert_eq!(code(|| Ok(())), 0);
    }

    #[test]
    fn each_thread_has_its_own_last_error() {
        assert_eq!(code(|| Err(Fault::Null("qp"))), libc::EINVAL);
        std::thread::spawn(|| assert_eq!(message(), "no error"))
            .join()
            .unwrap();
        assert_eq!(message(), "qp is NULL or misaligned");
    }
}
