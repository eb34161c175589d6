# SPDX-License-Identifier: Apache-2.0 OR MIT
# Disks from a guest whose root is one of them, with exercises.sh.
root=$(disk_of "$ROOT")
ro=$(disk_of ro)
qcow=$(disk_of qcow)
data=$(disk_of data)
[ -n "$ro" ] && [ -n "$qcow" ] && [ -n "$data" ] || fail "disks are missing: ro '$ro' qcow '$qcow' data '$data'"

sum() { dd if="/dev/$1" bs=1M iflag=direct 2> /dev/null | sha256sum | cut -c 1-64; }
fails() { ! "$@"; }
forget() { echo 3 > /proc/sys/vm/drop_caches; }
mounted_on() { sed -n "s,^/dev/\([^ ]*\) $1 .*,\1,p" /proc/mounts; }
facts() { lsblk -bdnro SIZE,RO,LOG-SEC,PHY-SEC "/dev/$1"; }
queues() { ls "/sys/block/$1/mq" | wc -l; }

check root-is-the-disk is "$(mounted_on /)" "$root"
check root-is-first is "$root" vda
check root-facts is "$(facts "$root")" "$ROOT_SIZE 0 512 $(cat "/sys/block/$root/queue/physical_block_size")"
check read-only-facts is "$(facts "$ro" | cut -d ' ' -f 1-3)" "$RO_SIZE 1 512"
check qcow-facts is "$(facts "$qcow" | cut -d ' ' -f 1-3)" "$QCOW_SIZE 0 512"
check data-facts is "$(facts "$data")" "$DATA_SIZE 0 4096 4096"
check queues is "$(queues "$data")" 2
check serial is "$(cat "/sys/block/$ro/serial")" ro
check discard test "$(cat "/sys/block/$data/queue/discard_max_bytes")" -gt 0
check write-zeroes test "$(cat "/sys/block/$data/queue/write_zeroes_max_bytes")" -gt 0
check write-cache is "$(cat "/sys/block/$data/queue/write_cache")" "write back"

# Everything that is on them.
check read-only-sum is "$(sum "$ro")" "$RO_SUM"
check qcow-sum is "$(sum "$qcow")" "$QCOW_SUM"
check read-only-refuses fails dd if=/dev/zero of="/dev/$ro" bs=4096 count=1 conv=fsync
check read-only-untouched is "$(sum "$ro")" "$RO_SUM"

# The network writes on the root disk, the entropy device beside it.
check dhcp lease eth1
check ping ping -q -c 3 -i 0.1 10.0.2.2
fetch_to_disk() { fetch /root/file && sync && forget && is "$(sha256sum < /root/file)" "$SUM  -"; }
check fetch-to-disk fetch_to_disk
check rng random 16

# Parts of blocks of an image, in the middle of it.
write_qcow() {
    head -c 3145728 /dev/urandom > /tmp/part
    dd if=/tmp/part of="/dev/$qcow" bs=65536 seek=33 oflag=direct conv=fsync 2> /dev/null && forget &&
        dd if="/dev/$qcow" bs=65536 skip=33 count=48 iflag=direct 2> /dev/null | cmp - /tmp/part
}
check qcow-write write_qcow
mark qcow "$(sum "$qcow")"

# Space is taken and given back.
dd if=/dev/urandom of="/dev/$data" bs=1M count=8 conv=fsync 2> /dev/null
mark written
read -r answer
check blkdiscard blkdiscard "/dev/$data"
mark discarded
read -r answer
head -c 65536 /dev/zero > /tmp/zeroes
zeroes() {
    head -c 65536 /dev/urandom | dd of="/dev/$data" bs=65536 conv=fsync 2> /dev/null && blkdiscard -z -l 65536 "/dev/$data" &&
        dd if="/dev/$data" bs=65536 count=1 iflag=direct 2> /dev/null | cmp - /tmp/zeroes
}
check write-zeroes-done zeroes
check mkfs mke2fs -q -F -t ext4 "/dev/$data"
check mount mount "/dev/$data" /mnt
head -c 25165824 /dev/urandom > /mnt/large
sum=$(sha256sum < /mnt/large)
sync
forget
check large is "$(sha256sum < /mnt/large)" "$sum"
mark filled
read -r answer
rm /mnt/large
sync
check fstrim fstrim /mnt
mark trimmed
read -r answer

# The cache is turned off and on; what is written meanwhile is right.
cache() {
    echo "$1" > "/sys/block/$data/cache_type" && is "$(cat "/sys/block/$data/cache_type")" "$1" &&
        is "$(cat "/sys/block/$data/queue/write_cache")" "$1" && cp /tmp/part /mnt/part && sync && forget && cmp /tmp/part /mnt/part
}
if [ "$CACHE" = yes ]; then
    check write-through cache "write through"
    check write-back cache "write back"
fi

# It grows while it is used.
if [ "$RESIZE" = yes ]; then
    mark resize
    grown() { [ "$(blockdev --getsize64 "/dev/$data")" = "$GROWN_SIZE" ]; }
    check grows await 20 grown
    check resize2fs resize2fs "/dev/$data"
    check larger test "$(df -k /mnt | awk 'END { print $2 }')" -gt $((DATA_SIZE / 1024))
fi
check umount umount /mnt
said=$(dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|JBD2:|blk_update_request' | grep -v "$ro")
check no-errors is "$said" ""
check kernel-log clean_log
