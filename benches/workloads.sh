# Sourced by bench.sh: what is built, and how it is measured.
#
# context_NAME DIR    writes the context
# measure_NAME        runs the builders in turn, through `timed`

debian=base/debian:latest

# The base images, in the registry before anything is measured.
prepare_bases() {
  local kept=$target/fixtures/debian-bookworm.tar
  if [ ! -s "$kept" ]; then
    say "Making a Debian with debootstrap"
    mkdir -p "$target/fixtures"
    sh tests/debian-base.sh "$kept"
  fi
  say "Pushing base images"
  push_base debian "$kept"
  case " ${workloads[*]} " in *" base "*)
    # With Debian some 1 GiB of content; half of it random, in files of 256 KiB.
    local layers=("$kept") at
    for at in 1 2 3 4 5; do
      mkdir -p "$work/layer/data/$at"
      head -c 80M /dev/urandom | split -b 256K -a 4 - "$work/layer/data/$at/random-"
      words 80 | split -b 256K -a 4 - "$work/layer/data/$at/words-"
      tar --create --sort=name --owner=0 --group=0 --file "$work/layer-$at.tar" --directory "$work/layer" "data/$at"
      layers+=("$work/layer-$at.tar")
      discard "$work/layer"
    done
    push_base six "${layers[@]}"
    rm -f "$work"/layer-*.tar ;;
  esac
  case " ${workloads[*]} " in *" tree "*)
    mkdir -p "$work/layer/many"
    many_files "$work/layer/many" 500000 500 200
    tar --create --owner=0 --group=0 --file "$work/layer.tar" --directory "$work/layer" many
    discard "$work/layer"
    push_base tree "$kept" "$work/layer.tar"
    rm -f "$work/layer.tar" ;;
  esac
  remove_discarded
}

# words MIB: text that compresses as source code does.
words() {
  awk -v bytes="$(($1 << 20))" 'BEGIN {
    srand(7)
    while (bytes > 0) {
      line = ""
      for (i = 0; i < 9; i++) line = line sprintf("%s%d ", substr("functionreturnvaluestructmatchstringresult", 1 + int(rand() * 30), 4 + int(rand() * 8)), rand() * 1000)
      print line
      bytes -= length(line) + 1
    }
  }' | head -c "$(($1 << 20))" || [ $? = 141 ] # awk may hear that head has enough
}

# many_files DIR FILES DIRECTORIES BYTES: files of about so many bytes, all different.
many_files() {
  perl -e '
    my ($dir, $files, $dirs, $bytes) = @ARGV;
    srand 11;
    my $text = join "", map { sprintf "%s%d ", substr("functionreturnvaluestructmatchstring", int rand 25, 5), int rand 10000 } 1 .. 200000;
    my $per = $files / $dirs;
    for my $d (0 .. $dirs - 1) {
      my $sub = sprintf "%s/d%04d", $dir, $d;
      mkdir $sub or die "$sub: $!";
      for my $f (0 .. $per - 1) {
        open my $out, ">", sprintf("%s/f%05d.txt", $sub, $f) or die $!;
        print $out "$d $f ", substr $text, int rand(length($text) - 2 * $bytes), $bytes / 2 + int rand $bytes;
        close $out or die $!;
      }
    }' "$@"
}

# cold WORKLOAD: each builder with an empty store, and a repository that has nothing yet.
cold() {
  local round builder command
  for round in $(seq "$rounds"); do
    for builder in $builders; do
      reset_builder "$builder"
      command_for "$builder" "$work/contexts/$1" "$1/$builder-$round"
      resolve_command
      timed "$1" "$builder" "$round" "${command[@]}"
    done
  done
}

# built_once WORKLOAD: each builder has built it, from an empty store. A daemon stays, and waits.
built_once() {
  local builder
  for builder in $builders; do
    reset_builder "$builder"
    build_once "$1" "$builder" "$1/$builder"
  done
}

# build_once WORKLOAD BUILDER IMAGE OPTION…: not measured.
build_once() {
  local workload=$1 builder=$2 image=$3 command
  shift 3
  command_for "$builder" "$work/contexts/$workload" "$image" "$@"
  resolve_command
  "${command[@]}" > "$work/once.log" 2>&1 < /dev/null || { tail -n 20 "$work/once.log" >&2; return 1; }
}

context_meta() {
  cat > "$1/Dockerfile" <<DOCKERFILE
FROM $registry/$debian
ENV MODE=production LANG=C.UTF-8
LABEL org.opencontainers.image.title=meta
WORKDIR /srv/app
EXPOSE 8080
USER nobody
CMD ["/bin/sh", "-c", "echo ready"]
DOCKERFILE
}
# Then the same where nothing asks what the base has, and on a base that every builder knows.
measure_meta() {
  local round builder command again=$work/contexts/meta-again
  cold meta
  floor_of_base meta debian
  mkdir -p "$work/contexts/labels" "$again"
  grep -v WORKDIR "$work/contexts/meta/Dockerfile" > "$work/contexts/labels/Dockerfile"
  cold labels
  cp "$work/contexts/meta/Dockerfile" "$again/"
  built_once meta-again
  for round in $(seq "$rounds"); do
    for builder in $builders; do
      sed "s/^LABEL .*/LABEL round=$round/" "$work/contexts/meta/Dockerfile" > "$again/Dockerfile"
      command_for "$builder" "$again" "meta-again/$builder-$round"
      resolve_command
      timed meta-again "$builder" "$round" "${command[@]}"
    done
  done
}

context_runs() {
  { echo "FROM $registry/$debian"
    for at in $(seq 20); do echo "RUN echo $at > /file-$at"; done; } > "$1/Dockerfile"
}
measure_runs() { cold runs; }

context_stages() {
  { for at in 1 2 3 4; do
      echo "FROM $registry/$debian AS stage$at"
      echo "RUN sleep 3 && echo $at > /result-$at"
    done
    echo "FROM $registry/$debian"
    for at in 1 2 3 4; do echo "COPY --from=stage$at /result-$at /"; done; } > "$1/Dockerfile"
}
measure_stages() { cold stages; }

context_small() {
  mkdir "$1/src"
  many_files "$1/src" 30000 300 6000
  printf 'FROM %s\nCOPY src /src\n' "$registry/$debian" > "$1/Dockerfile"
}
measure_small() {
  cold small
  floor small "$work/contexts/small/src"
}

context_big() {
  { head -c 512M /dev/urandom; words 512; } > "$1/file"
  printf 'FROM %s\nCOPY file /file\n' "$registry/$debian" > "$1/Dockerfile"
}
measure_big() {
  cold big
  floor big "$work/contexts/big/file"
}

# floor WORKLOAD PATH: what the machine itself needs, alone: to read and copy the files, to hash them,
# to compress them on all processors.
floor() {
  local round
  for round in $(seq "$rounds"); do
    timed "$1" 'floor: copy' "$round" cp -r "$2" "$work/copied"
    discard "$work/copied"
    timed "$1" 'floor: tar and sha256' "$round" sh -c "tar -C / -cf - '$2' | sha256sum"
    timed "$1" 'floor: tar and gzip -6 on all processors' "$round" sh -c "tar -C / -cf - '$2' | pigz -6 > /dev/null"
  done
}

# floor_of_base WORKLOAD NAME: what the machine needs to inflate the layers of a base, and to unpack them.
floor_of_base() {
  local round dir=$work/base-$2
  [ -e "$dir" ] || skopeo --insecure-policy copy --quiet --src-cert-dir "$work/ca" "docker://$registry/base/$2:latest" "dir:$dir"
  for round in $(seq "$rounds"); do
    timed "$1" 'floor: gunzip of the base' "$round" sh -c 'for blob in $(jq -r ".layers[].digest[7:]" "$0/manifest.json"); do pigz -dc "$0/$blob"; done > /dev/null' "$dir"
    mkdir "$work/unpacked"
    timed "$1" 'floor: gunzip and tar of the base' "$round" sh -c 'for blob in $(jq -r ".layers[].digest[7:]" "$0/manifest.json"); do pigz -dc "$0/$blob" | tar -xC "$1"; done' "$dir" "$work/unpacked"
    discard "$work/unpacked"
  done
}

context_base() {
  printf 'FROM %s/base/six:latest\nRUN echo done > /done\n' "$registry" > "$1/Dockerfile"
}
measure_base() {
  cold base
  floor_of_base base six
}

# 30 000 files, 12 steps.
context_noop() {
  mkdir "$1/src" "$1/etc"
  many_files "$1/src" 30000 300 6000
  echo settings > "$1/etc/settings"
  cat > "$1/Dockerfile" <<DOCKERFILE
FROM $registry/$debian
ENV A=1
RUN echo 1 > /one
RUN echo 2 > /two
WORKDIR /app
COPY etc /etc/app
COPY src /app/src
RUN ls /app/src | wc -l > /count
RUN echo 3 > /three
COPY etc/settings /settings
RUN echo 4 > /four
LABEL b=2
CMD ["true"]
DOCKERFILE
}
measure_noop() {
  local round builder command
  built_once noop
  for round in $(seq "$rounds"); do
    for builder in $builders; do
      command_for "$builder" "$work/contexts/noop" "noop/$builder"
      resolve_command
      timed noop "$builder" "$round" "${command[@]}"
      command_for "$builder" "$work/contexts/noop" "noop/$builder" nopush
      resolve_command
      timed noop-without-push "$builder" "$round" "${command[@]}"
    done
  done
}

context_edit() { context_noop "$1"; }
measure_edit() {
  local round builder command
  built_once edit
  for round in $(seq "$rounds"); do
    for builder in $builders; do
      echo "edited $builder $round" > "$work/contexts/edit/src/d0150/f00050.txt"
      command_for "$builder" "$work/contexts/edit" "edit/$builder"
      resolve_command
      timed edit "$builder" "$round" "${command[@]}"
    done
  done
}

# The cache is in the registry; the machine is new; one file has changed.
context_runner() { context_noop "$1"; }
measure_runner() {
  local round builder command
  for builder in $builders; do
    reset_builder "$builder"
    echo "first $builder" > "$work/contexts/runner/src/d0150/f00050.txt"
    build_once runner "$builder" "runner/$builder" "cache-to=cache/$builder"
  done
  for round in $(seq "$rounds"); do
    for builder in $builders; do
      reset_builder "$builder"
      echo "edited $builder $round" > "$work/contexts/runner/src/d0150/f00050.txt"
      command_for "$builder" "$work/contexts/runner" "runner/$builder" "cache-from=cache/$builder"
      resolve_command
      timed runner "$builder" "$round" "${command[@]}"
    done
  done
}

# A step on 500 000 files, and the same on Debian alone; both bases are unpacked before.
context_tree() {
  mkdir "$1/many" "$1/few"
  printf 'FROM %s/base/tree:latest\nRUN true\n' "$registry" > "$1/many/Dockerfile"
  printf 'FROM %s\nRUN true\n' "$registry/$debian" > "$1/few/Dockerfile"
}
measure_tree() {
  local round builder size command
  for builder in $builders; do
    reset_builder "$builder"
    build_once tree/many "$builder" "tree/$builder-many" nopush
    build_once tree/few "$builder" "tree/$builder-few" nopush
  done
  for round in $(seq "$rounds"); do
    for builder in $builders; do
      for size in many few; do
        sed -i "2s/.*/RUN echo $round > \/etc\/touched/" "$work/contexts/tree/$size/Dockerfile"
        command_for "$builder" "$work/contexts/tree/$size" "tree/$builder-$size" nopush
        resolve_command
        timed "tree-$size" "$builder" "$round" "${command[@]}"
      done
    done
  done
}

# Two things that must end well, sockless alone: `big` with 256 MiB of memory, caches of files included,
# and a layer of 10 GB.
context_limit() {
  mkdir "$1/big" "$1/huge"
  { head -c 512M /dev/urandom; words 512; } > "$1/big/file"
  printf 'FROM %s\nCOPY file /file\n' "$registry/$debian" > "$1/big/Dockerfile"
  truncate -s 5G "$1/huge/zeros"
  head -c 5G /dev/urandom > "$1/huge/noise"
  printf 'FROM scratch\nCOPY . /\n' > "$1/huge/Dockerfile"
  printf 'Dockerfile\n' > "$1/huge/.dockerignore"
}
measure_limit() {
  local builder command group=
  for builder in $builders; do
    case $builder in sockless-*) ;; *) continue ;; esac
    reset_builder "$builder"
    memory_group=
    if [ -e /sys/fs/cgroup/memory/memory.limit_in_bytes ]; then
      memory_group=/sys/fs/cgroup/memory/sockless-bench-$$
      mkdir "$memory_group"
      echo 268435456 > "$memory_group/memory.limit_in_bytes"
    elif grep -qw memory /sys/fs/cgroup/cgroup.subtree_control 2>/dev/null; then
      memory_group=/sys/fs/cgroup/sockless-bench-$$
      mkdir "$memory_group"
      echo 268435456 > "$memory_group/memory.max"
    else
      echo "limit: no memory controller here, so nothing is limited: not measured" >&2
    fi
    if [ -n "$memory_group" ]; then
      command_for "$builder" "$work/contexts/limit/big" "limit/$builder"
      resolve_command
      timed limit-256-MiB "$builder" 1 sh -c 'echo $$ > "$0/cgroup.procs"; exec "$@"' "$memory_group" "${command[@]}"
      rmdir "$memory_group"
      memory_group=
    fi
    reset_builder "$builder"
    command_for "$builder" "$work/contexts/limit/huge" "limit/$builder-huge"
    resolve_command
    timed limit-10-GB "$builder" 1 "${command[@]}"
    reset_builder "$builder"
  done
}
