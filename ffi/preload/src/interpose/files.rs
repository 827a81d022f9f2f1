//! `open`, `stat`, `readlink`, `opendir` and `close`: devices appear, are opened and closed.
//!
//! What `open` of a node gives is a descriptor of `/dev/null`: a character device with a descriptor of its own, which
//! is all that libibverbs looks at besides the ioctls that are answered here.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use libc::{DIR, c_char, c_int, mode_t, size_t, ssize_t};

use super::{Opened, add, contexts, fail, remove};
use crate::errno::Errno;
use crate::faults;
use crate::settings::Settings;
use crate::uverbs::Context;
use crate::vfio::{Container, Group};
use crate::world::{self, Device};

/// Where device nodes are.
const VERBS_NODES: &str = "/dev/infiniband";
const VFIO_NODES: &str = "/dev/vfio";
const NULL: &CStr = c"/dev/null";

/// Tells libibverbs where to look, as soon as the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = {
    extern "C" fn at_load() {
        let dir = Settings::from_env().map_or_else(|_| std::env::temp_dir(), |settings| settings.dir);
        // SAFETY: the dynamic linker runs this before the program's first thread can start another.
        unsafe { std::env::set_var("SYSFS_PATH", world::choose_sysfs_root(&dir)) };
    }
    at_load
};

/// A path that a program passed.
///
/// # Safety
/// `path` is null or a string.
unsafe fn path_of<'a>(path: *const c_char) -> Option<&'a Path> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's contract.
    let text = unsafe { CStr::from_ptr(path) };
    Some(Path::new(OsStr::from_bytes(text.to_bytes())))
}

/// A path that leads to one of ours.
enum Target {
    /// The node of a verbs device.
    Verbs(&'static Device),
    /// VFIO's container.
    Container,
    /// The VFIO group of a device.
    Group(&'static Device),
    /// A file of the sysfs tree, by its real path.
    File(CString),
}

impl Target {
    /// Where the path leads; none if it is none of ours.
    ///
    /// # Safety
    /// `path` is null or a string.
    unsafe fn of(path: *const c_char) -> Option<Self> {
        // SAFETY: the caller's contract.
        let path = unsafe { path_of(path) }?;
        if let Some(file) = world::pci_path(path) {
            return CString::new(file.into_os_string().into_vec()).ok().map(Self::File);
        }
        let (dir, name) = (path.parent()?.to_str()?, path.file_name()?.to_str()?);
        let find =
            |is_it: &dyn Fn(&Device) -> bool| world::get()?.devices.iter().find(|device| is_it(device));
        match dir {
            VERBS_NODES => find(&|device| device.node_name() == name).map(Self::Verbs),
            VFIO_NODES if name == "vfio" => world::get().map(|_| Self::Container),
            VFIO_NODES => find(&|device| device.group().to_string() == name).map(Self::Group),
            _ => None,
        }
    }

    /// The path that the kernel is asked for in its place.
    fn real(&self) -> *const c_char {
        match self {
            Self::File(path) => path.as_ptr(),
            _ => NULL.as_ptr(),
        }
    }

    /// What an open descriptor of it stands for; none for a plain file.
    fn opened(&self) -> Option<Opened> {
        Some(match self {
            Self::Verbs(device) => Opened::Verbs(Arc::new(Context::open(device))),
            Self::Container => Opened::Container(Arc::new(Container::default())),
            Self::Group(device) => Opened::Group(Arc::new(Group::new(device))),
            Self::File(_) => return None,
        })
    }
}

/// In place of libc's `open`.
///
/// # Safety
/// As for `open(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> RawFd {
    // SAFETY: the caller's contract.
    let target = unsafe { Target::of(path) };
    if matches!(target, Some(Target::Verbs(_)))
        && let Err(errno) = faults::strike()
    {
        return fail(errno);
    }
    let real = target.as_ref().map_or(path, Target::real);
    // SAFETY: the system call that the caller asked for, with its arguments, or with a path of ours.
    let fd = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, real, flags, mode) };
    // CAST: descriptors are ints.
    let fd = fd as RawFd;
    if let Some(what) = target.and_then(|target| target.opened()).filter(|_| fd >= 0) {
        add(fd, what);
    }
    fd
}

/// In place of libc's `stat`.
///
/// # Safety
/// As for `stat(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn stat(path: *const c_char, to: *mut libc::stat) -> c_int {
    // SAFETY: the caller's contract.
    let target = unsafe { Target::of(path) };
    let real = target.as_ref().map_or(path, Target::real);
    // SAFETY: the system call that the caller asked for, with its arguments, or with a path of ours; on x86-64 the
    // structure of libc is that of the kernel.
    let result = unsafe { libc::syscall(libc::SYS_newfstatat, libc::AT_FDCWD, real, to, 0) };
    // CAST: `stat` returns an int.
    result as c_int
}

/// In place of libc's `readlink`.
///
/// # Safety
/// As for `readlink(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn readlink(path: *const c_char, to: *mut c_char, len: size_t) -> ssize_t {
    // SAFETY: the caller's contract.
    let target = unsafe { Target::of(path) };
    let real = target.as_ref().map_or(path, Target::real);
    // SAFETY: the system call that the caller asked for, with its arguments, or with a path of ours.
    let result = unsafe { libc::syscall(libc::SYS_readlink, real, to, len) };
    // CAST: a length, or -1.
    result as ssize_t
}

/// In place of libc's `opendir`: the sysfs tree is made when somebody looks at it.
///
/// # Safety
/// As for `opendir(3)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn opendir(path: *const c_char) -> *mut DIR {
    type OpenDir = unsafe extern "C" fn(*const c_char) -> *mut DIR;
    // SAFETY: the caller's contract.
    if unsafe { path_of(path) }.is_some_and(world::is_in_sysfs) && world::get().is_none() {
        fail(Errno::NOENT);
        return std::ptr::null_mut();
    }
    // SAFETY: looks up a symbol by a name that is a string.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, c"opendir".as_ptr()) };
    if next.is_null() {
        fail(Errno(libc::ENOSYS));
        return std::ptr::null_mut();
    }
    // SAFETY: libc's `opendir` has this type.
    let next = unsafe { std::mem::transmute::<*mut libc::c_void, OpenDir>(next) };
    // SAFETY: the caller's contract.
    unsafe { next(path) }
}

/// In place of libc's `close`: with a device's descriptor its objects end.
///
/// # Safety
/// As for `close(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: RawFd) -> c_int {
    match remove(fd) {
        Some(Opened::Verbs(context)) => context.close(),
        Some(Opened::Container(container)) => container.close(),
        Some(Opened::Function(function)) => function.close(),
        Some(Opened::Group(_)) => {}
        None => contexts().iter().for_each(|context| context.forget_file(fd)),
    }
    // SAFETY: the system call that the caller asked for, with its argument.
    let result = unsafe { libc::syscall(libc::SYS_close, fd) };
    // CAST: `close` returns an int.
    result as c_int
}
