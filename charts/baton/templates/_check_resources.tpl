{{/* A quantity as a number: 500m, 16Gi, 2, and what YAML makes of a long one, 1.6e+10. */}}
{{- define "baton.quantity" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?(e[+-]?[0-9]+)?" $text -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 -}}
{{- mulf (float64 $number) (index $units (trimPrefix $number $text)) -}}
{{- end -}}

{{/* A quantity as Kubernetes writes it: KubeRay's schema takes no other number than a whole one. */}}
{{- define "baton.quantityText" -}}
{{- if kindIs "string" . -}}{{- . -}}
{{- else if eq (float64 .) (floor .) -}}{{- printf "%d" (int64 .) -}}
{{- else -}}{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* A container's resources, every quantity a string. YAML. */}}
{{- define "baton.resources" -}}
{{- $found := dict -}}
{{- range $side, $given := default (dict) . -}}
{{- if eq $side "claims" -}}
{{- $_ := set $found $side $given -}}
{{- else if $given -}}
{{- $quantities := dict -}}
{{- range $key, $quantity := $given -}}{{- $_ := set $quantities $key (include "baton.quantityText" $quantity) -}}{{- end -}}
{{- $_ := set $found $side $quantities -}}
{{- end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* What Kubernetes would refuse of each pod's resources. (dict "root" $ "pools" …) */}}
{{- define "baton.checkAllResources" -}}
{{- $values := .root.Values -}}
{{- $all := dict "gateway" $values.gateway "controller" $values.controller "ray.head" $values.ray.head "ray.autoscaling" $values.ray.autoscaling "redis.embedded" $values.redis.embedded "rayRedis.embedded" $values.rayRedis.embedded -}}
{{- range $name, $pool := .pools -}}{{- $_ := set $all (printf "pools.%s" $name) $pool -}}{{- end -}}
{{- range $what, $part := $all -}}
{{- include "baton.checkResources" (dict "what" (printf "%s.resources" $what) "resources" $part.resources) -}}
{{- end -}}
{{- end -}}

{{/* (dict "what" <values' path> "resources" …) */}}
{{- define "baton.checkResources" -}}
{{- $resources := default (dict) .resources -}}
{{- $limits := default (dict) $resources.limits -}}
{{- range $key, $limit := $limits -}}
{{- if contains "/" $key -}}
{{- $number := include "baton.quantity" $limit | float64 -}}
{{- if ne $number (floor $number) -}}
{{- fail (printf "%s.limits has %v of %s: devices are given whole; use a whole number" $.what $limit $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $key, $request := default (dict) $resources.requests -}}
{{- $number := include "baton.quantity" $request | float64 -}}
{{- if hasKey $limits $key -}}
{{- $limit := index $limits $key -}}
{{- if gt $number (include "baton.quantity" $limit | float64) -}}
{{- fail (printf "%s: requests.%s (%v) is over limits.%s (%v); lower the request or raise the limit" $.what $key $request $key $limit) -}}
{{- end -}}
{{- if and (contains "/" $key) (ne $number (include "baton.quantity" $limit | float64)) -}}
{{- fail (printf "%s: requests.%s (%v) is not limits.%s (%v): devices are not shared; set the limit alone" $.what $key $request $key $limit) -}}
{{- end -}}
{{- else if contains "/" $key -}}
{{- fail (printf "%s.requests has %s without a limit: devices are given by the limit; set it in limits" $.what $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Both are memory of the pod's from the beginning, or may become it. (… "config" <baton.bareConfig>) */}}
{{- define "baton.checkMemory" -}}
{{- $limit := (default (dict) .pool.resources.limits).memory -}}
{{- if $limit -}}
{{- $engine := mergeOverwrite (dict "kv_cache_bytes" 536870912) (default (dict) .config.engine) .pool.engine -}}
{{- $needed := addf $engine.kv_cache_bytes (include "baton.quantity" .pool.shmSize | float64) -}}
{{- if gt $needed (include "baton.quantity" $limit | float64) -}}
{{- fail (printf "pools.%s.resources.limits.memory is %v, but shmSize (%v) and engine.kv_cache_bytes (%d) are more than that, and the model comes on top; raise it or lower them" .name $limit .pool.shmSize (int64 $engine.kv_cache_bytes)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
