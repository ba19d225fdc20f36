{{/* What the schema cannot say: settings that do not fit together. Fails with a sentence. */}}
{{- define "baton.check" -}}
{{- include "baton.checkNames" . -}}
{{- include "baton.checkModel" . -}}
{{- include "baton.checkConfig" . -}}
{{- range $name, $pool := include "baton.pools" . | fromJson -}}
{{- include "baton.checkPool" (dict "root" $ "name" $name "pool" $pool) -}}
{{- end -}}
{{- include "baton.checkDecode" . -}}
{{- include "baton.checkGateway" . -}}
{{- include "baton.checkRedis" . -}}
{{- include "baton.checkRayRedis" . -}}
{{- end -}}

{{- define "baton.checkNames" -}}
{{- $name := include "baton.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$" $name) -}}
{{- fail (printf "%q cannot name a RayCluster and its Services: lower-case letters, digits and hyphens, beginning with a letter, at most 40 characters; choose another release name or set fullnameOverride" $name) -}}
{{- end -}}
{{- end -}}

{{- define "baton.checkModel" -}}
{{- $model := .Values.model -}}
{{- if and (eq $model.source "pvc") (not $model.pvc.claimName) -}}
{{- fail "model.source is pvc; set model.pvc.claimName to the claim that holds the model" -}}
{{- end -}}
{{- if and (eq $model.source "hostPath") (not $model.hostPath.path) -}}
{{- fail "model.source is hostPath; set model.hostPath.path to a folder that every node has" -}}
{{- end -}}
{{- if and (eq $model.source "image") (not $model.image.reference) -}}
{{- fail "model.source is image; set model.image.reference to the OCI image that holds the model" -}}
{{- end -}}
{{- if and (eq $model.source "huggingFace") (not (and $model.huggingFace.repo $model.huggingFace.revision)) -}}
{{- fail "model.source is huggingFace; set model.huggingFace.repo and model.huggingFace.revision (a commit, so that all pods hold the same weights)" -}}
{{- end -}}
{{- end -}}

{{- define "baton.checkConfig" -}}
{{- range $key := list "pools" "model" -}}
{{- if hasKey $.Values.config $key -}}
{{- fail (printf "config.%s has a place of its own: set %s at the top of the values" $key $key) -}}
{{- end -}}
{{- end -}}
{{- $config := include "baton.bareConfig" . | fromJson -}}
{{- if ne $config.cluster.backend "ray" -}}
{{- fail (printf "config.cluster.backend is %q, but in this chart Ray starts the workers; leave it out" $config.cluster.backend) -}}
{{- end -}}
{{- range $section, $settings := dict "gateway" (list "port") "controller" (list "port") "worker" (list "port" "metrics_port") -}}
{{- range $setting := $settings -}}
{{- if not (int (index $config $section $setting)) -}}
{{- fail (printf "config.%s.%s has to be a fixed port: Services, probes and network policies name it" $section $setting) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq (int $config.worker.port) (int $config.worker.metrics_port) -}}
{{- fail "config.worker.port and config.worker.metrics_port are the same; choose two" -}}
{{- end -}}
{{- end -}}

{{- define "baton.checkPool" -}}
{{- $name := .name -}}
{{- $pool := .pool -}}
{{- $transport := (default (dict) .root.Values.config.kv_transfer).transport | default "auto" -}}
{{- $degree := mul (int $pool.tensorParallelSize) (int $pool.expertParallelSize) -}}
{{- if and (gt (int $degree) 1) (lt (int $pool.numGpus) (int $degree)) -}}
{{- fail (printf "pools.%s has %d GPUs in resources.limits (%s), but tensorParallelSize x expertParallelSize is %d; give it that many or lower the degrees" $name (int $pool.numGpus) .root.Values.gpuResourceName (int $degree)) -}}
{{- end -}}
{{- if lt (int $pool.maxReplicas) (int $pool.replicas) -}}
{{- fail (printf "pools.%s.replicas (%d) is over maxReplicas (%d); raise the maximum" $name (int $pool.replicas) (int $pool.maxReplicas)) -}}
{{- end -}}
{{- if lt (int $pool.replicas) (int $pool.minReplicas) -}}
{{- fail (printf "pools.%s.replicas (%d) is below minReplicas (%d); raise one or lower the other" $name (int $pool.replicas) (int $pool.minReplicas)) -}}
{{- end -}}
{{- if hasKey $pool.worker "drain_s" -}}
{{- fail (printf "pools.%s.worker.drain_s is set by drainSeconds, which the pod's grace period follows; use that" $name) -}}
{{- end -}}
{{- if $pool.rdma.enabled -}}
{{- if not (and $pool.rdma.resourceName (gt (int $pool.rdma.count) 0)) -}}
{{- fail (printf "pools.%s asks for RDMA; name the device's resource in rdma.resourceName, with a count of 1 or more: without it pods would run on nodes that have none" $name) -}}
{{- end -}}
{{- if ne $transport "nixl" -}}
{{- fail (printf "pools.%s asks for RDMA, but config.kv_transfer.transport is %q, which cannot use it; Baton does not fall back to TCP behind your back: set nixl, or rdma.enabled=false" $name $transport) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $transport "nixl") (not $pool.rdma.enabled) -}}
{{- fail (printf "config.kv_transfer.transport is nixl, but pools.%s has no RDMA, and UCX would take TCP there without a word; set rdma.enabled=true with its resource for every pool" $name) -}}
{{- end -}}
{{- if and (eq $transport "shared_memory") (eq $pool.role "prefill") (gt (int $pool.replicas) 0) -}}
{{- fail (printf "config.kv_transfer.transport is shared_memory, but workers of pools.%s are in other pods than those of decode pools; use auto or gloo" $name) -}}
{{- end -}}
{{- $_ := include "baton.workerGrace" . -}}
{{- end -}}

{{- define "baton.checkDecode" -}}
{{- $decoding := 0 -}}
{{- range $name, $pool := include "baton.pools" . | fromJson -}}
{{- if eq $pool.role "decode" -}}{{- $decoding = add $decoding (int $pool.replicas) -}}{{- end -}}
{{- end -}}
{{- if not (int $decoding) -}}
{{- fail "no pool of role decode has replicas: every answer is decoded there; give one of them 1 or more" -}}
{{- end -}}
{{- end -}}

{{- define "baton.gatewayGrace" -}}
{{- $drain := (index .Values.config "gateway").drain_s | default 10 | ceil | int -}}
{{- $least := add (int .Values.gateway.preStopSeconds) $drain 10 -}}
{{- $given := int .Values.gateway.terminationGracePeriodSeconds -}}
{{- if and $given (lt $given (int $least)) -}}
{{- fail (printf "gateway.terminationGracePeriodSeconds is %d, but preStopSeconds and config.gateway.drain_s take up to %ds: use %d or more, or 0 for that" $given (add (int .Values.gateway.preStopSeconds) $drain) (int $least)) -}}
{{- end -}}
{{- default $least $given -}}
{{- end -}}

{{- define "baton.checkGateway" -}}
{{- $scaling := .Values.gateway.autoscaling -}}
{{- if and $scaling.enabled (not (kindIs "invalid" .Values.gateway.replicas)) -}}
{{- fail "gateway.autoscaling is enabled and gateway.replicas is set: both would own the number; leave one of them out" -}}
{{- end -}}
{{- if lt (int $scaling.maxReplicas) (int $scaling.minReplicas) -}}
{{- fail "gateway.autoscaling.maxReplicas is below minReplicas; raise it" -}}
{{- end -}}
{{- $_ := include "baton.gatewayGrace" . -}}
{{- end -}}

{{- define "baton.checkRedis" -}}
{{- $redis := .Values.redis -}}
{{- $given := or $redis.url $redis.existingSecret -}}
{{- if and $redis.embedded.enabled $given -}}
{{- fail "redis.embedded.enabled and a Redis of your own (redis.url or redis.existingSecret) are both set; choose one" -}}
{{- end -}}
{{- if and $redis.url $redis.existingSecret -}}
{{- fail "redis.url and redis.existingSecret are both set; choose one" -}}
{{- end -}}
{{- if not (or $redis.embedded.enabled $given) -}}
{{- fail "Baton needs a Redis: set redis.existingSecret (a Secret with its URL) or redis.url, or redis.embedded.enabled=true for a trial" -}}
{{- end -}}
{{- if not (regexMatch "^[A-Za-z0-9._~-]*$" $redis.embedded.password.value) -}}
{{- fail "redis.embedded.password.value becomes part of a URL; use letters, digits and . _ ~ - alone" -}}
{{- end -}}
{{- include "baton.checkRedisPort" (dict "policy" .Values.networkPolicy "name" "redis" "setting" "redis.url" "url" $redis.url) -}}
{{- end -}}

{{- define "baton.checkRayRedis" -}}
{{- $redis := .Values.rayRedis -}}
{{- if .Values.ray.gcsFaultTolerance.enabled -}}
{{- if and $redis.address $redis.embedded.enabled -}}
{{- fail "rayRedis.address and rayRedis.embedded.enabled are both set; choose one" -}}
{{- end -}}
{{- if not (or $redis.address $redis.embedded.enabled) -}}
{{- fail "Ray's GCS needs a Redis of its own to outlive its head: set rayRedis.address, or rayRedis.embedded.enabled=true for a trial, or ray.gcsFaultTolerance.enabled=false (then all workers die with the head)" -}}
{{- end -}}
{{- else if $redis.embedded.enabled -}}
{{- fail "rayRedis.embedded.enabled is of no use without ray.gcsFaultTolerance.enabled" -}}
{{- end -}}
{{- include "baton.checkRedisPort" (dict "policy" .Values.networkPolicy "name" "rayRedis" "setting" "rayRedis.address" "url" .Values.rayRedis.address) -}}
{{- if and .Values.rayRedis.address .Values.redis.url -}}
{{- if eq (include "baton.hostPort" .Values.rayRedis.address) (include "baton.hostPort" .Values.redis.url) -}}
{{- fail "rayRedis.address and redis.url are one Redis; Ray gives up when its own is away, so give it one that nobody else fills or restarts" -}}
{{- end -}}
{{- end -}}
{{- if contains "@" .Values.rayRedis.address -}}
{{- fail "rayRedis.address holds a password, which everybody who may read the RayCluster could read; set rayRedis.password" -}}
{{- end -}}
{{- end -}}

{{- define "baton.rayRedisAddress" -}}
{{- default (printf "redis://%s-ray-redis:6379" (include "baton.fullname" .)) .Values.rayRedis.address -}}
{{- end -}}

{{/* Where the password of Ray's Redis is; the embedded one always has one. */}}
{{- define "baton.rayRedisPassword" -}}
{{- $password := .Values.rayRedis.password -}}
{{- if or .Values.rayRedis.embedded.enabled $password.value $password.existingSecret -}}
valueFrom:
  secretKeyRef:
    name: {{ default (include "baton.secretName" .) $password.existingSecret }}
    key: {{ $password.key }}
{{- end -}}
{{- end -}}

{{/* host:port of a Redis's URL, without its password. */}}
{{- define "baton.hostPort" -}}
{{- $host := (urlParse .).host -}}
{{- ternary $host (printf "%s:6379" $host) (regexMatch ":[0-9]+$" $host) -}}
{{- end -}}

{{/* The policy lets nobody through to another port than its own. */}}
{{- define "baton.checkRedisPort" -}}
{{- if and .policy.enabled .url -}}
{{- $port := regexFind "[0-9]+$" (include "baton.hostPort" .url) | int -}}
{{- $open := int (index .policy .name).port -}}
{{- if ne $port $open -}}
{{- fail (printf "%s is on port %d, but networkPolicy.%s.port is %d; set it to %d" .setting $port .name $open $port) -}}
{{- end -}}
{{- end -}}
{{- end -}}
