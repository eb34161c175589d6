# SPDX-License-Identifier: Apache-2.0 OR MIT
# A folder that the host shares: what each writes the other reads. With exercises.sh, in a guest whose root is a disk.
sum() { sha256sum < "$1" | cut -c 1-64; }
root=$(disk_of "$ROOT")
check root-is-the-disk is "$(sed -n 's,^/dev/\([^ ]*\) / .*,\1,p' /proc/mounts)" "$root"
check dhcp lease eth1
check ping ping -q -c 3 -i 0.1 10.0.2.2
check rng random 16
mkdir /share
check mount mount -t virtiofs shared /share
check read-large is "$(sum /share/large)" "$LARGE_SUM"
check many is "$(ls /share/many | wc -l)" 500
check many-contents is "$(cat /share/many/* | sha256sum | cut -c 1-64)" "$MANY_SUM"
check mode is "$(stat -c %a /share/large)" 640
head -c 5000001 /dev/urandom > /tmp/up
write() { cp /tmp/up /share/up && sync && echo 3 > /proc/sys/vm/drop_caches && cmp /tmp/up /share/up; }
check write write
check rename mv /share/up /share/renamed
folder() { mkdir -p /share/folder/deep && echo 1 > /share/folder/deep/one && echo 2 >> /share/folder/deep/one && is "$(cat /share/folder/deep/one | tr '\n' ' ')" "1 2 "; }
check folder folder
check link is "$(ln -s large /share/link && readlink /share/link)" large
# From the network to the folder and to the disk, and from one to the other.
around() {
    fetch /share/fetched && fetch /root/fetched && sync && echo 3 > /proc/sys/vm/drop_caches && cmp /share/fetched /root/fetched &&
        cp /share/large /root/large && cp /root/large /share/large-again && sync && echo 3 > /proc/sys/vm/drop_caches &&
        is "$(sum /root/large)" "$LARGE_SUM" && is "$(sum /share/large-again)" "$LARGE_SUM"
}
check around around
mark wrote "$(sum /share/renamed)"
read -r answer
check from-host is "$(cat /share/from-host)" "$answer"
two() {
    for n in 1 2; do (while :; do cmp /share/large /share/renamed > /dev/null; sha256sum /share/large; [ ! -e /tmp/stop ] || break; done > /tmp/two.$n) & done
    sleep 1
    : > /tmp/stop
    wait
    is "$(cat /tmp/two.* | cut -c 1-64 | sort -u)" "$LARGE_SUM"
}
check two-readers two

# The daemon ends under a mounted folder, and there is another one: what it knew of open files is gone, so the driver has
# to start over.
again() {
    driver=/sys/bus/virtio/drivers/virtiofs
    for path in $driver/virtio*; do virtio=${path##*/}; done
    echo "$virtio" > $driver/unbind
    umount /share
    echo "$virtio" > $driver/bind
    mount -t virtiofs shared /share
}
for time in $KILLS; do
    mark "kill-$time"
    read -r answer
    check "$time-killed-again" again
    check "$time-killed-read" is "$(sum /share/large)" "$LARGE_SUM"
    check "$time-killed-write" write
    rm -f /share/up
    # The other devices have gone on.
    check "$time-killed-around" around
    check "$time-killed-rng" random 16
done
said=$(dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|JBD2:|blk_update_request')
check no-errors is "$said" ""
