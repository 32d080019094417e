# Makes a real directory tree to store. To be sourced, not run.
#
#   make_tree DIR ENTRIES       fills the absent directory DIR with at least ENTRIES entries
#   make_directory DIR ENTRIES  one directory in DIR with that many small files
#
# The sources of the crates that cargo has unpacked, several times under different names if they
# are too few (they are fetched if there are none), and beside them what sources never contain:
# symbolic links that dangle and loop, hard links across directories, empty files and directories,
# names that are not UTF-8, a name of 255 bytes, deep nesting, a file of several MiB with no
# pattern, a file of zeros, sizes around the 64 KiB limit of inline data, mode bits, old times.

make_tree() {
    local dir=$1 entries=$2 copy=0 registry crate have
    mkdir "$dir" && (make_odd_entries "$dir/odd") || return
    registry=${CARGO_HOME:-$HOME/.cargo}/registry/src
    if [ ! -d "$registry" ]; then
        cargo fetch --locked || return
    fi
    have=$(count_entries "$dir")
    while [ "$have" -lt "$entries" ]; do
        copy=$((copy + 1))
        mkdir "$dir/sources-$copy" || return
        for crate in "$registry"/*/*/; do
            [ "$have" -ge "$entries" ] && return
            cp -a "$crate" "$dir/sources-$copy/" || return
            have=$((have + 1 + $(count_entries "$crate")))
        done
        if [ "$copy" -gt 200 ]; then
            echo "no $entries entries in 200 copies of $registry" >&2
            return 1
        fi
    done
}

make_directory() {
    mkdir -p "$1/d" && (cd "$1/d" && seq "$2" | split -l 1 -a 5 - file-)
}

# Entries below a directory, itself not counted; names may contain anything.
count_entries() { find "$1" -mindepth 1 -printf . | wc -c; }

make_odd_entries() {
    local dir=$1 size i
    mkdir "$dir" && cd "$dir" || return
    (
        set -e
        mkdir empty-directory links names sizes modes wide
        : >empty-file
        # Links.
        printf 'one inode, four names\n' >links/first
        ln links/first links/second
        ln links/first names/third
        ln links/first wide/fourth
        ln -s first links/relative
        ln -s ../names links/directory
        ln -s /nonexistent/target links/dangling
        ln -s loop links/loop
        ln -s "$(printf 'x%.0s' {1..1000})" links/long
        ln -s $'\xff\xfe' links/not-utf8
        # Names.
        : >$'names/latin1-\xe9\xe8'
        : >$'names/\xff\xfe\x80'
        : >$'names/new\nline'
        : >'names/ leading and trailing '
        : >'names/-rf'
        : >"names/quote'\"\\\$*?[]"
        : >"names/$(printf 'n%.0s' {1..255})"
        mkdir -p "names/$(printf 'deep/%.0s' {1..60})"
        printf 'bottom\n' >"names/$(printf 'deep/%.0s' {1..60})bottom"
        # Sizes: around pages, around the limit of data inside of messages, large.
        for size in 1 4095 4096 4097 65535 65536 65537 1048575 8388608 8388609; do
            head -c "$size" /dev/urandom >"sizes/$size"
        done
        head -c 12345678 /dev/zero >sizes/zeros
        head -c 33554432 /dev/urandom >sizes/large
        # Mode bits and times. Readable by their owner: unreadable input is another test's matter.
        for i in 400 444 500 600 640 644 700 755 777 1644 2755 4755 6711; do
            printf 'mode %s\n' "$i" >"modes/$i"
            chmod "$i" "modes/$i"
        done
        mkdir modes/sticky modes/setgid modes/read-only
        : >modes/read-only/inside
        chmod 1777 modes/sticky
        chmod 2750 modes/setgid
        chmod 555 modes/read-only
        touch -d '1971-02-03 04:05:06.789012345 UTC' modes/644
        touch -d '2100-01-01 00:00:00.000000001 UTC' modes/755
        touch -h -d '1999-12-31 23:59:59.5 UTC' links/dangling
        # One directory with many names.
        for i in {1..3000}; do printf '%d\n' "$i"; done | split -l 1 -a 4 - wide/name-
        touch -d '2001-09-09 01:46:40 UTC' wide empty-directory
    )
}
