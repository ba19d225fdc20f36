{{/* (dict "root" $ "config" <baton.bareConfig>) */}}
{{- define "baton.checkConfig" -}}
{{- range $key := list "pools" "model" -}}
{{- if hasKey $.root.Values.config $key -}}
{{- fail (printf "config.%s has a place of its own: set %s at the top of the values" $key $key) -}}
{{- end -}}
{{- end -}}
{{- $config := .config -}}
{{- if ne $config.cluster.backend "ray" -}}
{{- fail (printf "config.cluster.backend is %q, but in this chart Ray starts the workers; leave it out" $config.cluster.backend) -}}
{{- end -}}
{{- if hasKey $config.gateway "replicas" -}}
{{- fail "config.gateway.replicas is of `baton serve`, which starts no gateways here; set gateway.replicas" -}}
{{- end -}}
{{- if hasKey $config.worker "drain_s" -}}
{{- fail "config.worker.drain_s is set by poolDefaults.drainSeconds, which the pods' grace period follows; use that, or drainSeconds of a pool" -}}
{{- end -}}
{{- range $section := list "gateway" "controller" -}}
{{- $settings := index $config $section -}}
{{- if not (int $settings.port) -}}
{{- fail (printf "config.%s.port has to be a fixed port: Services, probes and network policies name it" $section) -}}
{{- end -}}
{{- include "baton.checkHost" (dict "what" (printf "config.%s.host" $section) "host" $settings.host) -}}
{{- end -}}
{{- end -}}

{{/* A loopback address is Baton's default, and in a pod nobody else's. (dict "what" … "host" …) */}}
{{- define "baton.checkHost" -}}
{{- $host := default "127.0.0.1" .host -}}
{{- if eq (include "baton.isLoopback" $host) "true" -}}
{{- fail (printf "%s is %s, where nobody outside of the pod is heard, its probes included; use 0.0.0.0 or \"::\"" .what $host) -}}
{{- end -}}
{{- end -}}

{{- define "baton.isLoopback" -}}
{{- regexMatch "^(localhost|127[.][0-9.]+|\\[?::1\\]?)$" (lower .) -}}
{{- end -}}

{{/* What Baton's own validators refuse, said before pods crash of it. Here are Baton's defaults for
     what is not given; tests compare them with Baton's. (dict "config" <baton.bareConfig>) */}}
{{- define "baton.checkTimes" -}}
{{- $gateway := mergeOverwrite (dict "default_deadline_s" 600 "max_deadline_s" 3600) (default (dict) .config.gateway) -}}
{{- if gt (float64 $gateway.default_deadline_s) (float64 $gateway.max_deadline_s) -}}
{{- fail (printf "config.gateway.default_deadline_s (%v) is over max_deadline_s (%v); raise the maximum" $gateway.default_deadline_s $gateway.max_deadline_s) -}}
{{- end -}}
{{- $transfer := mergeOverwrite (dict "network" "any" "transport" "auto") (default (dict) .config.kv_transfer) -}}
{{- if and (eq $transfer.network "rdma") (eq $transfer.transport "gloo") -}}
{{- fail "config.kv_transfer.network is rdma, and transport gloo is TCP; set transport to nixl" -}}
{{- end -}}
{{- if and (eq $transfer.network "rdma") (has $transfer.transport (list "shared_memory" "cuda_ipc")) -}}
{{- fail (printf "config.kv_transfer.network is rdma, and transport %s uses no network; set transport to nixl, or to auto, where workers of one host may share memory" $transfer.transport) -}}
{{- end -}}
{{- $session := mergeOverwrite (dict "report_s" 0.5 "silence_s" 5) (default (dict) .config.session) -}}
{{- if gt (float64 $session.report_s) (divf $session.silence_s 2) -}}
{{- fail (printf "config.session.report_s (%v) is over half of silence_s (%v); lower it or raise silence_s" $session.report_s $session.silence_s) -}}
{{- end -}}
{{- $registry := mergeOverwrite (dict "heartbeat_s" 1 "ttl_s" 5 "poll_s" 0.25) (default (dict) .config.registry) -}}
{{- if gt (float64 $registry.heartbeat_s) (divf $registry.ttl_s 2) -}}
{{- fail (printf "config.registry.heartbeat_s (%v) is over half of ttl_s (%v); lower it or raise ttl_s" $registry.heartbeat_s $registry.ttl_s) -}}
{{- end -}}
{{- $cluster := mergeOverwrite (dict "fence_s" 5) (default (dict) .config.cluster) -}}
{{- if lt (float64 $cluster.fence_s) (mulf 2 (maxf $registry.heartbeat_s $registry.poll_s)) -}}
{{- fail (printf "config.cluster.fence_s (%v) is under twice registry.heartbeat_s (%v) or registry.poll_s (%v): workers that are well would be killed; raise it" $cluster.fence_s $registry.heartbeat_s $registry.poll_s) -}}
{{- end -}}
{{- end -}}
