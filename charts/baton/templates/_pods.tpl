{{/* What every pod's spec begins with. (dict "root" $ "part" <values of the component>
     "for" <ServiceAccount>) */}}
{{- define "baton.podBasics" -}}
serviceAccountName: {{ include "baton.serviceAccountName" . | quote }}
automountServiceAccountToken: {{ default false .token }}
enableServiceLinks: false
securityContext: {{- toYaml (default (dict) .root.Values.podSecurityContext) | nindent 2 }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- with .part.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .part.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* A pod's spec with extraPodSpec over it: lists of containers, initContainers and volumes
     grow, everything else is replaced. (dict "spec" <YAML> "extra" … "what" <values' path>) */}}
{{- define "baton.withExtra" -}}
{{- $spec := fromYaml .spec -}}
{{- if hasKey $spec "Error" -}}{{- fail (printf "%s: the pod's spec does not parse: %s" .what $spec.Error) -}}{{- end -}}
{{- $part := trimSuffix ".extraPodSpec" .what -}}
{{- include "baton.checkNested" (dict "spec" $spec "part" $part) -}}
{{- $extra := deepCopy (default (dict) .extra) -}}
{{- range $key := list "terminationGracePeriodSeconds" "restartPolicy" -}}
{{- if hasKey $extra $key -}}
{{- fail (printf "%s.%s is not yours to set: the chart computes it, so that a drain is never cut short" $.what $key) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "containers" "initContainers" "volumes" -}}
{{- if hasKey $extra $key -}}
{{- $_ := set $extra $key (concat (default (list) (index $spec $key)) (index $extra $key)) -}}
{{- end -}}
{{- end -}}
{{- $spec = mergeOverwrite $spec $extra -}}
{{- include "baton.checkTwice" (dict "spec" $spec "part" $part) -}}
{{- include "baton.checkUser" (dict "pod" $spec.securityContext "containers" (concat (default (list) $spec.initContainers) $spec.containers) "what" .what) -}}
{{- toYaml $spec -}}
{{- end -}}

{{/* Names that are there twice, which Kubernetes refuses, or of which the later one wins.
     (dict "spec" <pod's spec> "part" <values' path of the component>) */}}
{{- define "baton.checkTwice" -}}
{{- /* KubeRay's own are in pods of Ray's. */ -}}
{{- $containers := dict "wait-gcs-ready" true "autoscaler" true -}}
{{- range $container := concat (default (list) .spec.initContainers) .spec.containers -}}
{{- if hasKey $containers $container.name -}}
{{- fail (printf "%s.extraPodSpec has a container named %s, as the chart or KubeRay has one; choose another name" $.part $container.name) -}}
{{- end -}}
{{- $_ := set $containers $container.name true -}}
{{- $variables := dict -}}
{{- range $container.env -}}
{{- if hasKey $variables .name -}}
{{- fail (printf "%s.env has %s, which the chart sets by itself or which is there twice; leave it out" $.part .name) -}}
{{- end -}}
{{- $_ := set $variables .name true -}}
{{- end -}}
{{- $places := dict -}}
{{- range $container.volumeMounts -}}
{{- $place := clean (default "" .mountPath) -}}
{{- if hasKey $places $place -}}
{{- fail (printf "%s: the volumes %s and %s are both mounted at %s; choose another path (paths, or extraPodSpec)" $.part (index $places $place) .name $place) -}}
{{- end -}}
{{- $_ := set $places $place .name -}}
{{- end -}}
{{- end -}}
{{- $volumes := dict -}}
{{- range .spec.volumes -}}
{{- if hasKey $volumes .name -}}
{{- fail (printf "%s.extraPodSpec has a volume named %s, as the chart has one; choose another name" $.part .name) -}}
{{- end -}}
{{- $_ := set $volumes .name true -}}
{{- end -}}
{{- end -}}

{{/* In what is mounted to be read, nobody can make a folder to mount something else at. The
     chart's own containers alone. (dict "spec" <pod's spec> "part" <values' path>) */}}
{{- define "baton.checkNested" -}}
{{- range $container := concat (default (list) .spec.initContainers) .spec.containers -}}
{{- range $outer := $container.volumeMounts -}}
{{- range $inner := $container.volumeMounts -}}
{{- if and $outer.readOnly (hasPrefix (printf "%s/" (clean $outer.mountPath)) (clean $inner.mountPath)) -}}
{{- fail (printf "%s: the volume %s at %s lies inside of the volume %s at %s, which is mounted to be read alone; choose another path (paths)" $.part $inner.name $inner.mountPath $outer.name $outer.mountPath) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The kubelet starts no root where runAsNonRoot is set. A container's word goes over its pod's.
     (dict "pod" <pod's securityContext> "containers" … "what" <values' path>) */}}
{{- define "baton.checkUser" -}}
{{- range $container := .containers -}}
{{- $context := mergeOverwrite (dict) (deepCopy (default (dict) $.pod)) (deepCopy (default (dict) $container.securityContext)) -}}
{{- if and $context.runAsNonRoot (hasKey $context "runAsUser") (eq (int $context.runAsUser) 0) -}}
{{- fail (printf "%s: runAsUser is 0 and runAsNonRoot is true, so the container %s would never start; set runAsNonRoot: false beside it, or another user" $.what $container.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What every pod begins with, the embedded Redis' too. */}}
{{- define "baton.checkUsers" -}}
{{- include "baton.checkUser" (dict "pod" .Values.podSecurityContext "containers" (list (dict "name" "of every pod" "securityContext" .Values.securityContext)) "what" "podSecurityContext and securityContext") -}}
{{- end -}}

{{/* The chart's probe, with the user's keys over it. What it asks is one of these keys, so a
     user's takes the place of the chart's. (dict "given" … "own" <YAML>) */}}
{{- define "baton.probe" -}}
{{- $probe := fromYaml .own -}}
{{- $given := default (dict) .given -}}
{{- $asks := list "exec" "httpGet" "tcpSocket" "grpc" -}}
{{- range $key := keys $given -}}
{{- if has $key $asks -}}{{- range $asks -}}{{- $_ := unset $probe . -}}{{- end -}}{{- end -}}
{{- end -}}
{{- range $key, $value := $given -}}{{- $_ := set $probe $key $value -}}{{- end -}}
{{- toYaml $probe -}}
{{- end -}}

{{/* The volumes that hold the model, and where they are mounted. */}}
{{- define "baton.modelVolumes" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "pvc" -}}
- name: model
  persistentVolumeClaim: {claimName: {{ $model.pvc.claimName | quote }}, readOnly: true}
{{- else if eq $model.source "hostPath" -}}
- name: model
  hostPath: {path: {{ $model.hostPath.path | quote }}, type: Directory}
{{- else if eq $model.source "image" -}}
- name: model
  image: {reference: {{ $model.image.reference | quote }}, pullPolicy: {{ $model.image.pullPolicy }}}
{{- else if eq $model.source "huggingFace" -}}
- name: model
  emptyDir: {sizeLimit: {{ include "baton.quantityText" $model.huggingFace.sizeLimit | quote }}}
{{- end -}}
{{- end -}}

{{- define "baton.modelMounts" -}}
{{- if ne .Values.model.source "embedded" -}}
- name: model
  mountPath: {{ .Values.paths.model | quote }}
  readOnly: true
{{- end -}}
{{- end -}}

{{/* Downloads the model before anything starts. (dict "root" $ "image" …) */}}
{{- define "baton.modelInit" -}}
{{- if eq .root.Values.model.source "huggingFace" -}}
{{- $from := .root.Values.model.huggingFace -}}
- name: download-model
  image: {{ .image }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  command:
    - hf
    - download
    - {{ $from.repo | quote }}
    - --revision
    - {{ $from.revision | quote }}
    - --local-dir
    - {{ .root.Values.paths.model | quote }}
  env:
    - name: HF_HOME
      value: /tmp/huggingface
    {{- if or .root.Values.secrets.huggingFace.value .root.Values.secrets.huggingFace.existingSecret }}
    {{- include "baton.secretEnv" (dict "root" .root "name" "HF_TOKEN" "entry" .root.Values.secrets.huggingFace) | nindent 4 }}
    {{- end }}
  securityContext: {{- toYaml (default (dict) .root.Values.securityContext) | nindent 4 }}
  resources:
    requests: {cpu: 500m, memory: 512Mi}
    limits: {memory: 2Gi}
  volumeMounts:
    - {name: model, mountPath: {{ .root.Values.paths.model | quote }}}
    - {name: tmp, mountPath: /tmp}
{{- end -}}
{{- end -}}
