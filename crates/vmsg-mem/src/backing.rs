// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which files may back memory that is not ours.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, FsWord, fstat, fstatfs};

use crate::Error;

/// File systems (`linux/magic.h`) whose pages the kernel provides: tmpfs,
/// hugetlbfs, ext4, XFS, Btrfs.
const KERNEL_SERVED: [FsWord; 5] = [0x0102_1994, 0x9584_58f6, 0xef53, 0x5846_5342, 0x9123_683e];

/// Checks that a file lent by a peer can be mapped without asking anybody else
/// for its pages.
///
/// A page fault in a file whose contents another program provides (FUSE, a
/// network) lasts as long as that program likes; a device does in `mmap` and in page
/// faults whatever its driver likes. Only regular files of file systems that
/// the kernel itself serves pass. It asks the file system first, which even a
/// stalled one answers without its program.
///
/// # Errors
///
/// [`Error::ForeignFile`]; [`Error::Os`] if the descriptor cannot be looked at.
pub fn check_backing(fd: BorrowedFd<'_>) -> Result<(), Error> {
    let os = |what| {
        move |error: rustix::io::Errno| Error::Os {
            what,
            source: error.into(),
        }
    };
    let file_system = fstatfs(fd).map_err(os("fstatfs"))?.f_type;
    if !KERNEL_SERVED.contains(&file_system) {
        return Err(Error::ForeignFile);
    }
    let mode = fstat(fd).map_err(os("fstat"))?.st_mode;
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        return Err(Error::ForeignFile);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;
    use crate::Mapping;

    #[test]
    fn memfds_pass() {
        let (_mapping, fd) = Mapping::memfd("test", 4096, true).expect("memfd");
        check_backing(fd.as_fd()).expect("the kernel's own memory");
    }

    #[test]
    fn devices_sockets_and_what_programs_provide_do_not() {
        for path in ["/dev/zero", "/proc/self/maps", "/"] {
            let file = File::open(path).expect(path);
            let refused = check_backing(file.as_fd());
            assert!(
                matches!(refused, Err(Error::ForeignFile)),
                "{path}: {refused:?}"
            );
        }
        let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("sockets");
        assert!(matches!(
            check_backing(socket.as_fd()),
            Err(Error::ForeignFile)
        ));
    }
}
