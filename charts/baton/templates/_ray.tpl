{{/* `ray start` of the head: what KubeRay makes flags of. JSON; every value a string. */}}
{{- define "baton.headStartParams" -}}
{{- $ports := .Values.ray.ports -}}
{{- $own := dict "num-cpus" "0" -}}
{{- $_ := set $own "port" (toString (int $ports.gcs)) -}}
{{- $_ := set $own "ray-client-server-port" (toString (int $ports.client)) -}}
{{- $_ := set $own "node-manager-port" (toString (int $ports.nodeManager)) -}}
{{- $_ := set $own "object-manager-port" (toString (int $ports.objectManager)) -}}
{{- $_ := set $own "metrics-export-port" (toString (int $ports.metrics)) -}}
{{- $_ := set $own "object-store-memory" (toString (int64 .Values.ray.objectStoreBytes)) -}}
{{- $_ := set $own "include-dashboard" (toString .Values.ray.head.dashboard) -}}
{{- $_ := set $own "dashboard-host" (ternary "0.0.0.0" "127.0.0.1" .Values.ray.head.dashboard) -}}
{{- $_ := set $own "disable-usage-stats" "true" -}}
{{- toJson (merge (deepCopy .Values.ray.head.rayStartParams) $own) -}}
{{- end -}}

{{/* `ray start` of a pool's pod. One worker takes the pool's resource, so one fits. JSON. */}}
{{- define "baton.workerStartParams" -}}
{{- $ports := .root.Values.ray.ports -}}
{{- $own := dict "num-cpus" (toString (mul (int .pool.numCpus) (int .pool.numRanks))) "num-gpus" (toString (int .pool.numGpus)) -}}
{{- $_ := set $own "resources" (printf "'%s'" (toJson (dict .pool.rayResource 1))) -}}
{{- $_ := set $own "node-manager-port" (toString (int $ports.nodeManager)) -}}
{{- $_ := set $own "object-manager-port" (toString (int $ports.objectManager)) -}}
{{- $_ := set $own "metrics-export-port" (toString (int $ports.metrics)) -}}
{{- $_ := set $own "object-store-memory" (toString (int64 .root.Values.ray.objectStoreBytes)) -}}
{{- $_ := set $own "disable-usage-stats" "true" -}}
{{- toJson (merge (deepCopy .pool.rayStartParams) $own) -}}
{{- end -}}

{{- define "baton.rayEnv" -}}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
# Ray leaves CUDA_VISIBLE_DEVICES alone where an actor asks for no GPU.
- name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO
  value: "0"
# Under memory pressure Ray would kill workers before the kernel needs to.
- name: RAY_memory_monitor_refresh_ms
  value: "0"
# Ray Client's proxy forks beside gRPC's threads, and now and then the child crashed of it.
- name: GRPC_ENABLE_FORK_SUPPORT
  value: "0"
{{- end -}}

{{/* Probes of a Ray pod: KubeRay's own ask an HTTP server that only ray[default] brings.
     (dict "part" … "port" …) */}}
{{- define "baton.rayProbes" -}}
{{- $check := printf "tcpSocket: {port: %s}" .port -}}
startupProbe:
  {{- include "baton.probe" (dict "given" .part.startupProbe "own" (printf "%s\nperiodSeconds: 5\nfailureThreshold: 60" $check)) | nindent 2 }}
livenessProbe:
  {{- include "baton.probe" (dict "given" .part.livenessProbe "own" (printf "%s\nperiodSeconds: 10\ntimeoutSeconds: 5\nfailureThreshold: 12" $check)) | nindent 2 }}
readinessProbe:
  {{- include "baton.probe" (dict "given" .part.readinessProbe "own" (printf "%s\nperiodSeconds: 5\ntimeoutSeconds: 5\nfailureThreshold: 3" $check)) | nindent 2 }}
{{- end -}}

{{- define "baton.headPodSpec" -}}
{{- $params := include "baton.headStartParams" . | fromJson -}}
{{- include "baton.podBasics" (dict "root" . "part" .Values.ray.head "for" "head" "token" .Values.ray.autoscaling.enabled) }}
restartPolicy: {{ ternary "Never" "Always" .Values.ray.autoscaling.enabled }}
terminationGracePeriodSeconds: 30
containers:
  # KubeRay writes the command: ulimit -n 65536; ray start --head <rayStartParams> --block
  - name: ray-head
    image: {{ include "baton.workerImage" . }}
    imagePullPolicy: {{ .Values.images.pullPolicy }}
    ports:
      - {name: gcs-server, containerPort: {{ index $params "port" }}}
      - {name: client, containerPort: {{ index $params "ray-client-server-port" }}}
      - {name: metrics, containerPort: {{ index $params "metrics-export-port" }}}
      {{- if .Values.ray.head.dashboard }}
      - {name: dashboard, containerPort: 8265}
      {{- end }}
    env:
      {{- include "baton.rayEnv" . | nindent 6 }}
      {{- with .Values.ray.head.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    securityContext: {{- toYaml (default (dict) .Values.securityContext) | nindent 6 }}
    resources: {{- include "baton.resources" .Values.ray.head.resources | nindent 6 }}
    {{- include "baton.rayProbes" (dict "part" .Values.ray.head "port" (index $params "port")) | nindent 4 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: shm, mountPath: /dev/shm}
volumes:
  - name: tmp
    emptyDir: {}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ include "baton.quantityText" .Values.ray.head.shmSize | quote }}}
{{- end -}}

{{/* How long `leave` waits for the drain, and how long the pod may take after all. */}}
{{- define "baton.leaveSeconds" -}}
{{ add (ceil .drainSeconds | int) 5 }}
{{- end -}}

{{- define "baton.workerGrace" -}}
{{- $least := add (include "baton.leaveSeconds" .pool | int) 15 -}}
{{- $given := int .pool.terminationGracePeriodSeconds -}}
{{- if and $given (lt $given (int $least)) -}}
{{- fail (printf "pools.%s.terminationGracePeriodSeconds is %d, but draining takes up to %ds: use %d or more, or 0 for that" .name $given (int (include "baton.leaveSeconds" .pool)) (int $least)) -}}
{{- end -}}
{{- default $least $given -}}
{{- end -}}

{{/* The image of a pool: the workers', with what the pool sets of its own. A digest and a suffix
     belong to a repository and a tag, so a pool that has one of these inherits neither. */}}
{{- define "baton.poolImage" -}}
{{- $image := deepCopy .root.Values.images.worker -}}
{{- if or .pool.image.repository .pool.image.tag -}}{{- $image = pick $image "repository" -}}{{- end -}}
{{- range $key, $value := .pool.image -}}{{- $_ := set $image $key $value -}}{{- end -}}
{{- include "baton.image" (dict "root" .root "image" $image "what" (printf "pools.%s.image" .name)) -}}
{{- end -}}

{{/* Requests and limits of a pool's pod: the RDMA devices are on top. JSON. */}}
{{- define "baton.poolResources" -}}
{{- $resources := deepCopy .pool.resources -}}
{{- if .pool.rdma.enabled -}}
{{- range $side := list "requests" "limits" -}}
{{- $_ := set $resources $side (merge (default (dict) (index $resources $side)) (dict $.pool.rdma.resourceName (int $.pool.rdma.count))) -}}
{{- end -}}
{{- end -}}
{{- toJson $resources -}}
{{- end -}}

{{- define "baton.workerSecurityContext" -}}
{{- $context := deepCopy (default (dict) .root.Values.securityContext) -}}
{{- if .pool.rdma.enabled -}}
{{- /* Memory that a network card reads has to stay where it is. This lets root alone pin it:
Kubernetes knows no ambient capabilities. Other users need the nodes' limit (docs/deploy.md). */ -}}
{{- $capabilities := default (dict) $context.capabilities -}}
{{- $added := append (default (list) $capabilities.add) "IPC_LOCK" | uniq -}}
{{- $_ := set $context "capabilities" (merge (dict "add" $added) $capabilities) -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}

{{- define "baton.workerPodSpec" -}}
{{- $params := include "baton.workerStartParams" . | fromJson -}}
{{- $config := include "baton.config" .root | fromJson -}}
{{- $worker := include "baton.poolWorker" (dict "config" $config "pool" .pool) | fromJson -}}
{{- $image := include "baton.poolImage" . -}}
{{- include "baton.podBasics" (dict "root" .root "part" .pool "for" "worker") }}
# A pod that has ended is replaced by a new one (the autoscaler wants it so). A container that
# started again would find the order to leave that its predecessor had got.
restartPolicy: Never
terminationGracePeriodSeconds: {{ include "baton.workerGrace" . }}
{{- with include "baton.modelInit" (dict "root" .root "image" $image) }}
initContainers:
  {{- . | nindent 2 }}
{{- end }}
containers:
  # KubeRay writes the command: ulimit -n 65536; ray start <rayStartParams> --block
  - name: ray-worker
    image: {{ $image }}
    imagePullPolicy: {{ .root.Values.images.pullPolicy }}
    ports:
      - {name: session, containerPort: {{ int $worker.port }}}
      - {name: baton-metrics, containerPort: {{ int $worker.metrics_port }}}
      - {name: metrics, containerPort: {{ index $params "metrics-export-port" }}}
    env:
      - name: BATON_ADVERTISE_HOST
        valueFrom: {fieldRef: {fieldPath: status.podIP}}
      - name: BATON_RUN_DIR
        value: {{ .root.Values.paths.run | quote }}
      - name: BATON_CACHE
        value: {{ .root.Values.paths.cache | quote }}
      {{- include "baton.rayEnv" .root | nindent 6 }}
      {{- if .pool.rdma.enabled }}
      # UCX takes the best transport of these: without a working card there is none.
      - name: UCX_TLS
        value: {{ .pool.rdma.ucxTls | quote }}
      {{- end }}
      {{- with .pool.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    lifecycle:
      preStop:
        exec:
          command: [python, -m, baton.worker.leave, --timeout-s, {{ include "baton.leaveSeconds" .pool | quote }}]
    securityContext: {{- include "baton.workerSecurityContext" . | nindent 6 }}
    resources: {{- include "baton.poolResources" . | fromJson | include "baton.resources" | nindent 6 }}
    {{- include "baton.rayProbes" (dict "part" .pool "port" (index $params "node-manager-port")) | nindent 4 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: shm, mountPath: /dev/shm}
      - {name: run, mountPath: {{ .root.Values.paths.run | quote }}}
      - {name: cache, mountPath: {{ .root.Values.paths.cache | quote }}}
      {{- with include "baton.modelMounts" .root }}
      {{- . | nindent 6 }}
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ include "baton.quantityText" .pool.shmSize | quote }}}
  - name: run
    emptyDir: {}
  - name: cache
    {{- default (dict "emptyDir" dict) .root.Values.cacheVolume | toYaml | nindent 4 }}
  {{- with include "baton.modelVolumes" .root }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* The live RayCluster's group, where the autoscaler owns its size. JSON, or {}.
     (dict "root" $ "name" <pool>) */}}
{{- define "baton.liveGroup" -}}
{{- $found := dict -}}
{{- if .root.Values.ray.autoscaling.enabled -}}
{{- $live := lookup "ray.io/v1" "RayCluster" .root.Release.Namespace (include "baton.rayClusterName" .root) -}}
{{- if $live -}}
{{- range $live.spec.workerGroupSpecs -}}
{{- if eq .groupName $.name -}}{{- $found = . -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}
