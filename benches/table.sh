#!/usr/bin/env bash
# results.csv → a table: medians, and the ratio of sockless to the best of the others.
set -euo pipefail
csv=${1:?usage: table.sh results.csv}
[ -r "$csv" ] || { echo "table: cannot read $csv" >&2; exit 1; }
tail -n +2 "$csv" | sort -t, -k1,1 -k2,2 -k4,4n | awk -F, '
  BEGIN {
    split("meta 0.1 runs 0.4 stages 0.7 small 0.4 big 0.5 base 0.4 noop 0.3 edit 0.4 runner 0.5", g, " ")
    for (i = 1; i in g; i += 2) goal[g[i]] = g[i + 1]
    order = "meta labels meta-again runs stages small big base noop noop-without-push edit runner tree-many tree-few limit-256-MiB limit-10-GB"
  }
  { key = $1 SUBSEP $2; n[key]++; t[key, n[key]] = $4; if ($5 > peak[key]) peak[key] = $5
    pulled[key, n[key]] = $6; pushed[key, n[key]] = $7; if ($8 != 0) failed[key]++
    if (!seen[key]++) builders[$1] = builders[$1] SUBSEP $2 }
  function median(key, from,   m) { m = int((n[key] + 1) / 2); return n[key] % 2 ? from[key, m] : (from[key, m] + from[key, m + 1]) / 2 }
  function mib(bytes) { return sprintf("%.1f", bytes / 1048576) }
  END {
    print "| workload | builder | runs | median s | min–max s | sockless ÷ best peer | goal | peak MiB | MiB pulled | MiB pushed |"
    print "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |"
    count = split(order, names, " ")
    for (w = 1; w <= count; w++) {
      name = names[w]; best = 0
      total = split(substr(builders[name], 2), list, SUBSEP)
      for (b = 1; b <= total; b++) {
        key = name SUBSEP list[b]
        if (list[b] ~ /^(sockless|floor)/ || failed[key]) continue
        m = median(key, t)
        if (!best || m < best) best = m
      }
      for (b = 1; b <= total; b++) {
        key = name SUBSEP list[b]
        m = median(key, t)
        ratio = (list[b] ~ /^sockless/ && best) ? sprintf("%.2f", m / best) : ""
        if (failed[key]) ratio = failed[key] " failed"
        # The order is by time, so the bytes are those of the run in the middle.
        printf "| %s | %s | %d | %.2f | %.2f–%.2f | %s | %s | %.0f | %s | %s |\n", name, list[b], n[key], m, t[key, 1], t[key, n[key]],
          ratio, (list[b] ~ /^sockless/ ? goal[name] : ""), peak[key] / 1024, mib(median(key, pulled)), mib(median(key, pushed))
      }
    }
  }'
