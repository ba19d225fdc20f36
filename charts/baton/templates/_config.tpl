{{/* The pools as they are: names normalised, removed ones gone, defaults filled in. JSON. */}}
{{- define "baton.pools" -}}
{{- $pools := dict -}}
{{- $keys := dict -}}
{{- range $key, $given := .Values.pools -}}
{{- if not (kindIs "invalid" $given) -}}
{{- $name := $key | lower | replace "_" "-" | replace "." "-" -}}
{{- if hasKey $pools $name -}}
{{- fail (printf "pools.%s and pools.%s are both the pool %q; rename one of them" (index $keys $name) $key $name) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$" $name) -}}
{{- fail (printf "pools.%s: %q is no name of a pool: lower-case letters, digits and hyphens, beginning with a letter and not ending with a hyphen, at most 40" $key $name) -}}
{{- end -}}
{{- $pool := dict -}}
{{- range $setting, $value := $given -}}
{{- if not (kindIs "invalid" $value) -}}{{- $_ := set $pool $setting $value -}}{{- end -}}
{{- end -}}
{{- range $setting, $value := $.Values.poolDefaults -}}
{{- if not (hasKey $pool $setting) -}}
{{- $_ := set $pool $setting $value -}}
{{- else if has $setting (list "rdma" "podDisruptionBudget") -}}
{{- /* Their keys belong together: a pool that gives some has the others by default. */ -}}
{{- $_ := set $pool $setting (mergeOverwrite (deepCopy $value) (index $pool $setting)) -}}
{{- end -}}
{{- end -}}
{{- if not (hasKey $pool "role") -}}
{{- if not (has $name (list "prefill" "decode")) -}}
{{- fail (printf "pools.%s has no role; set pools.%s.role to prefill or decode" $key $key) -}}
{{- end -}}
{{- $_ := set $pool "role" $name -}}
{{- end -}}
{{- $limits := default (dict) (index $pool.resources "limits") -}}
{{- $_ := set $pool "numGpus" (include "baton.quantity" (default 0 (index $limits $.Values.gpuResourceName)) | float64 | int) -}}
{{- $_ := set $pool "numRanks" (mul (int $pool.tensorParallelSize) (int $pool.expertParallelSize)) -}}
{{- $_ := set $pool "rayResource" (printf "baton-pool-%s" $name) -}}
{{- $_ := set $pools $name $pool -}}
{{- $_ := set $keys $name $key -}}
{{- end -}}
{{- end -}}
{{- toJson $pools -}}
{{- end -}}

{{/* What Baton is told to serve. */}}
{{- define "baton.model" -}}
{{- $source := .Values.model.source -}}
{{- if eq $source "embedded" -}}
{{- .Values.model.embedded.name -}}
{{- else if or (eq $source "huggingFace") (not .Values.model.path) -}}
{{- .Values.paths.model -}}
{{- else -}}
{{- printf "%s/%s" .Values.paths.model (trimPrefix "/" .Values.model.path) -}}
{{- end -}}
{{- end -}}

{{/* One pool's part of the configuration. (dict "name" … "pool" …) JSON. */}}
{{- define "baton.poolConfig" -}}
{{- $pool := .pool -}}
{{- $worker := merge (dict) $pool.worker (dict "drain_s" $pool.drainSeconds) -}}
{{- $config := dict "role" $pool.role "replicas" $pool.replicas "max_replicas" $pool.maxReplicas -}}
{{- $_ := set $config "tensor_parallel_size" $pool.tensorParallelSize -}}
{{- $_ := set $config "expert_parallel_size" $pool.expertParallelSize -}}
{{- $_ := set $config "num_cpus" $pool.numCpus -}}
{{- $_ := set $config "num_gpus" (div $pool.numGpus $pool.numRanks) -}}
{{- $_ := set $config "resources" (dict $pool.rayResource 1) -}}
{{- if $pool.engine -}}{{- $_ := set $config "engine" $pool.engine -}}{{- end -}}
{{- $_ := set $config "worker" $worker -}}
{{- toJson $config -}}
{{- end -}}

{{/* What a pool's workers listen on and go by. (dict "config" <baton.bareConfig> "pool" …) JSON. */}}
{{- define "baton.poolWorker" -}}
{{- $worker := deepCopy .config.worker -}}
{{- range $setting, $value := .pool.worker -}}{{- $_ := set $worker $setting $value -}}{{- end -}}
{{- toJson $worker -}}
{{- end -}}

{{/* The configuration but for its generation. JSON. */}}
{{- define "baton.bareConfig" -}}
{{- $pools := dict -}}
{{- range $name, $pool := include "baton.pools" . | fromJson -}}
{{- $_ := set $pools $name (include "baton.poolConfig" (dict "name" $name "pool" $pool) | fromJson) -}}
{{- end -}}
{{- $address := default (printf "ray://%s:%d" (include "baton.headService" .) (int .Values.ray.ports.client)) .Values.ray.clientAddress -}}
{{- $own := dict "model" (include "baton.model" .) "pools" $pools -}}
{{- $_ := set $own "registry" (dict "cluster" .Release.Name) -}}
{{- $_ := set $own "cluster" (dict "backend" "ray" "ray_address" $address) -}}
{{- toJson (mergeOverwrite $own (deepCopy .Values.config)) -}}
{{- end -}}

{{/* What all workers of one generation have to agree on: the configuration without pools
     and without what only gateways and the controller go by. JSON. */}}
{{- define "baton.commonConfig" -}}
{{- toJson (omit (include "baton.bareConfig" . | fromJson) "pools" "gateway" "controller" "routing" "cluster" "served_model_name" "generation") -}}
{{- end -}}

{{/* A name for that, and for the software. */}}
{{- define "baton.generation" -}}
{{- $given := toString (default "" .Values.config.generation) -}}
{{- if $given -}}{{ $given }}{{- else -}}
{{- $model := omit .Values.model "path" -}}
{{- printf "%s-%s" .Chart.AppVersion (printf "%s %s %s" (include "baton.commonConfig" .) (include "baton.workerImage" .) (toJson $model) | sha256sum | trunc 10) -}}
{{- end -}}
{{- end -}}

{{/* The whole configuration. JSON. */}}
{{- define "baton.config" -}}
{{- $config := include "baton.bareConfig" . | fromJson -}}
{{- $_ := set $config "generation" (include "baton.generation" .) -}}
{{- toJson $config -}}
{{- end -}}

{{/* Changes when gateways have to be replaced: sizes of pools are none of their business. */}}
{{- define "baton.gatewayChecksum" -}}
{{- $config := include "baton.config" . | fromJson -}}
{{- $_ := unset $config "controller" -}}
{{- $_ := unset $config "cluster" -}}
{{- range $name, $pool := $config.pools -}}
{{- $_ := unset $pool "replicas" -}}
{{- $_ := unset $pool "max_replicas" -}}
{{- end -}}
{{- toJson $config | sha256sum -}}
{{- end -}}

{{/* Changes when a pool's workers have to be replaced. (dict "root" $ "name" … "pool" …) */}}
{{- define "baton.workersChecksum" -}}
{{- $pool := omit (include "baton.poolConfig" . | fromJson) "replicas" "max_replicas" -}}
{{- printf "%s %s %s" (include "baton.generation" .root) (include "baton.commonConfig" .root) (toJson $pool) | sha256sum -}}
{{- end -}}

{{/* Changes when one of these is given anew in the values: a generated one never is, and
     what is in a Secret of the user's is not known here. (dict "root" $ "of" (list "apiKey")) */}}
{{- define "baton.secretsChecksum" -}}
{{- $values := .root.Values -}}
{{- $found := dict -}}
{{- range $name := .of -}}
{{- if eq $name "redis" -}}
{{- $_ := set $found $name (list (pick $values.redis "url" "existingSecret" "key") $values.redis.embedded.password) -}}
{{- else if eq $name "rayRedis" -}}
{{- $_ := set $found $name $values.rayRedis.password -}}
{{- else -}}
{{- $_ := set $found $name (index $values.secrets $name) -}}
{{- end -}}
{{- end -}}
{{- toJson $found | sha256sum -}}
{{- end -}}
