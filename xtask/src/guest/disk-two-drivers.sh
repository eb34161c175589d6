# SPDX-License-Identifier: Apache-2.0 OR MIT
# Disks that another driver has written on before, and reads afterwards.
is() { [ "$1" = "$2" ] || { echo "$1 instead of $2"; return 1; }; }
sum() { dd if="/dev/$1" bs=1M iflag=direct 2> /dev/null | sha256sum | cut -c 1-64; }
# Large requests, single sectors, zeroes; to the end of the disk.
change() {
    dd if=/dev/urandom of="/dev/$1" bs=1M seek=5 count=3 oflag=direct conv=fsync 2>&1 || return 1
    for at in 0 1 7 2047 2049 16385 32767; do
        dd if=/dev/urandom of="/dev/$1" bs=512 seek=$at count=1 oflag=direct 2>&1 || return 1
    done
    blkdiscard -z -o 9437184 -l 2097152 "/dev/$1" && dd if=/dev/urandom of="/dev/$1" bs=4096 seek=2500 count=100 conv=fsync 2>&1
}
for which in raw qcow; do
    disk=$(disk_of $which)
    [ -n "$disk" ] || fail "no disk $which"
    [ $which = raw ] && wanted=$RAW_SUM || wanted=$QCOW_SUM
    check $which-read is "$(sum "$disk")" "$wanted"
    check $which-change change "$disk"
    echo 3 > /proc/sys/vm/drop_caches
    mark $which "$(sum "$disk")"
done
