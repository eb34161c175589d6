# SPDX-License-Identifier: Apache-2.0 OR MIT
# A root disk that a daemon provides, with exercises.sh: it is written on, and read again after the daemon or the device
# host, or both, were killed while nothing was under way.
root=$(disk_of "$ROOT")
forget() { echo 3 > /proc/sys/vm/drop_caches; }
check root-is-the-disk is "$(sed -n 's,^/dev/\([^ ]*\) / .*,\1,p' /proc/mounts)" "$root"
check queues is "$(ls "/sys/block/$root/mq" | wc -l)" 2
check dhcp lease eth1
check ping ping -q -c 3 -i 0.1 10.0.2.2
check rng random 16
fetch_to_disk() { fetch "/root/$1" && sync && forget && is "$(sha256sum < "/root/$1")" "$SUM  -"; }
check fetch-to-disk fetch_to_disk first

files=first
for what in daemon host both; do
    sync
    forget
    mark "kill-$what"
    read -r answer
    # Programs are read from the disk, too.
    for file in $files; do
        check "$what-killed-$file" is "$(sha256sum < "/root/$file")" "$SUM  -"
    done
    check "$what-killed-write" fetch_to_disk "$what"
    check "$what-killed-rng" random 16
    files="$files $what"
done
said=$(dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|JBD2:|blk_update_request')
check no-errors is "$said" ""
check kernel-log clean_log
