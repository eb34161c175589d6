# SPDX-License-Identifier: Apache-2.0 OR MIT
# Writes on two disks until it is told to stop, and tells of each file that is on its disk for good. Whatever happens to
# the other side meanwhile, nothing of that may be lost, and nothing may fail.
is() { [ "$1" = "$2" ] || { echo "$1 instead of $2"; return 1; }; }
# Files of a writer that are kept at a time.
KEPT=24

fill() {
    disk=$(disk_of "$1") && mke2fs -q -F -t ext4 "/dev/$disk" && mkdir -p "/mnt/$1" && mount "/dev/$disk" "/mnt/$1"
}
mount -t tmpfs tmpfs /mnt
check mkfs-raw fill raw
check mkfs-qcow fill qcow
mkdir /tmp/sums

# writer DISK NAME BYTES HOW: writes one file after the other, of random content.
writer() {
    n=0
    while [ ! -e /tmp/stop ]; do
        n=$((n + 1))
        file=$1/$2.$n
        head -c "$3" /dev/urandom > "/tmp/$1.$2"
        sum=$(sha256sum < "/tmp/$1.$2")
        sum=${sum%% *}
        case $4 in
        fsync) dd if="/tmp/$1.$2" of="/mnt/$file" bs=64k conv=fsync 2> "/tmp/$1.$2.said" ;;
        sync) cp "/tmp/$1.$2" "/mnt/$file" 2> "/tmp/$1.$2.said" && sync ;;
        esac || { bad "write-$1-$2" "$file: $(cat "/tmp/$1.$2.said")"; return; }
        echo "$sum  $file" > "/tmp/sums/$1.$2.$n"
        mark synced "$file $sum"
        old=$((n - KEPT))
        if [ $old -gt 0 ]; then
            rm "/tmp/sums/$1.$2.$old"
            mark removed "$1/$2.$old"
            rm "/mnt/$1/$2.$old"
        fi
    done
    ok "write-$1-$2"
}

# reader DISK: what was written is read again, from the disk itself.
reader() {
    count=0
    while [ ! -e /tmp/stop ]; do
        echo 3 > /proc/sys/vm/drop_caches
        for sum in /tmp/sums/"$1".*; do
            line=$(cat "$sum" 2> /dev/null) || continue
            found=$(sha256sum < "/mnt/${line#*  }" 2> /dev/null)
            # It may have been removed meanwhile.
            [ -e "$sum" ] || continue
            is "${found%% *}" "${line%% *}" > "/tmp/$1.reader" || { bad "read-$1" "${line#*  }: $(cat "/tmp/$1.reader")"; return; }
            count=$((count + 1))
            [ ! -e /tmp/stop ] || break
        done
    done
    mark "read-$1" "$count files"
    ok "read-$1"
}

# churn DISK: the same is written at the same place again and again, as fast as it goes, past the guest's cache.
churn() {
    count=0
    while [ ! -e /tmp/stop ]; do
        dd if=/tmp/base of="/mnt/$1/churn" bs=128k conv=notrunc oflag=direct 2> "/tmp/$1.churn" || { bad "churn-$1" "$(cat "/tmp/$1.churn")"; return; }
        count=$((count + 1))
    done
    echo 3 > /proc/sys/vm/drop_caches
    mark "churn-$1" "$count times"
    check "churn-$1" cmp /tmp/base "/mnt/$1/churn"
}

head -c 4194304 /dev/urandom > /tmp/base
churn raw &
churn qcow &
writer raw small 6000 fsync &
writer raw large 1500000 sync &
writer qcow small 6000 fsync &
writer qcow large 1500000 fsync &
reader raw &
reader qcow &
mark under-way
read -r answer
: > /tmp/stop
wait
sync
echo 3 > /proc/sys/vm/drop_caches
cat /tmp/sums/* > /tmp/all
all() { (cd /mnt && sha256sum -c /tmp/all | grep -v ': OK$'); [ $? = 1 ]; }
check all-there all
mark kept "$(wc -l < /tmp/all) files"
check umount-raw umount /mnt/raw
check umount-qcow umount /mnt/qcow
said=$(dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|JBD2:|blk_update_request|BUG:|Oops|Call Trace')
check no-errors is "$said" ""
