# SPDX-License-Identifier: Apache-2.0 OR MIT
# A whole Debian on a disk: systemd has mounted it, networkd has the address.
is() { [ "$1" = "$2" ] || { echo "$1 instead of $2"; return 1; }; }
host=http://10.0.2.2:$PORT
mark systemd "$(systemctl --version | head -n 1)"
check first-process is "$(cat /proc/1/comm)" systemd
check root is "$(findmnt -n -o FSTYPE,SOURCE / | tr -s ' ')" "ext4 /dev/$(disk_of "$ROOT")"
check by-id test -e "/dev/disk/by-id/virtio-$ROOT"
address() { ip -4 -o addr | grep -q 'inet 10\.0\.2\.15.*'; }
check address await 60 address
check ping ping -q -c 3 -i 0.2 10.0.2.2
fetch() { wget -q -O /root/file "$host/file" && sync && echo 3 > /proc/sys/vm/drop_caches && is "$(sha256sum < /root/file)" "$SUM  -"; }
check fetch fetch
check rng is "$(dd if=/dev/hwrng bs=64 count=16 2> /dev/null | wc -c)" 1024
check journal test -n "$(journalctl -b -q -n 1)"
said=$(dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|BUG:|Oops')
check no-errors is "$said" ""
